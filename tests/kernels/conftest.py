"""Shared by the operators' tests."""

import hypothesis
import pytest
import torch

from meanflow_kernels.routing import Route, force_route

HAS_GPU = torch.cuda.is_available()
torch.set_num_threads(1)


class Generators:
    """torch's, which Hypothesis seeds before each example: one that fails fails again, alone and on its way to less."""

    seed = staticmethod(torch.manual_seed)

    @staticmethod
    def getstate():
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if HAS_GPU else []

    @staticmethod
    def setstate(state):
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state_all(state[1])


GENERATORS = Generators()
hypothesis.register_random(GENERATORS)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run here."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def kernel_route():
    """Every op of the test runs its Triton kernel."""
    with force_route(Route.TRITON):
        yield


@pytest.fixture
def reference_route():
    """Every op of the test runs its reference."""
    with force_route(Route.REFERENCE):
        yield


@pytest.fixture(params=["reference", "triton"])
def each_route(request):
    """The test runs once a route."""
    with force_route(Route(request.param)):
        yield Route(request.param)


@pytest.fixture
def poisoned_empty():
    """Uninitialised memory is NaN: an element that a kernel does not write fails every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers in every run; compiled graphs of one test do not meet the next."""
    torch.manual_seed(0)
    torch._dynamo.reset()
