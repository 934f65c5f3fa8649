"""timestep_embedding: the kernel and the reference against fp64."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact, by_routes
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import timestep_embedding as plain_timestep_embedding
from meanflow_kernels import timestep_embedding, timestep_embedding_jvp
from meanflow_kernels.timestep_embedding.reference import timestep_embedding_ref, timestep_embedding_tangent_ref

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


def case(dim, max_period=10000.0):
    """The operator with dim and max_period bound."""
    return Case(
        op=lambda t: timestep_embedding(t, dim, max_period=max_period),
        op_jvp=lambda primals, tangents, **options: timestep_embedding_jvp(
            primals, tangents, dim, max_period=max_period, **options
        ),
        plain=lambda t: plain_timestep_embedding(t, dim, max_period),
        make=lambda device: ((torch.rand(3, device=device),), (torch.randn(3, device=device),)),
    )


class TestProperties(DualProperties):
    case = case(10)


# one row a regime: times, their largest value, dtype, dim, max_period
REGIMES = {
    "dit": (5, 1.0, F32, 256, 10000.0),
    "fp16": (5, 1.0, F16, 256, 10000.0),
    "odd dim": (4, 1.0, F32, 7, 10000.0),
    "least dim": (4, 1.0, F32, 2, 10000.0),
    # many, because a product t f near 1000 is off by up to 3e-5 in any code: of a few, either may be off twice as far
    "large times": (256, 1000.0, F32, 64, 10000.0),
    "another period": (4, 1.0, F32, 64, 100.0),
}


def check(batch, largest, dtype, dim, max_period, device):
    t, t_dot = (largest * torch.rand(batch, device=device)).to(dtype), torch.randn(batch, device=device).to(dtype)
    assert_as_exact(case(dim, max_period), (t,), (t_dot,))
    assert_as_exact(case(dim, max_period), (t,), (t_dot[1:3],), start=1)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_kernel_on_the_gpu(kernel_route, device, dtype):
    check(256, 1.0, dtype, 256, 10000.0, device)
    check(33, 1000.0, dtype, 255, 10000.0, device)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    batch, dim, step = (data.draw(st.integers(least, 6)) for least in (1, 2, 1))
    t, t_dot = torch.rand(2, batch * step, device=device)[:, ::step]
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    tangents = (t_dot[start : start + n],)
    reference, kernel = by_routes(lambda: timestep_embedding_jvp((t,), tangents, dim, tangent_start=start))
    for expected, found in zip(reference, kernel, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_reference_in_fp64():
    t, t_dot = torch.rand(2, 3, dtype=torch.float64)
    leaf = t.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: timestep_embedding_ref(t, 7, 100.0), (leaf,), check_forward_ad=True)
    expected = torch.func.jvp(case(7, 100.0).plain, (t,), (t_dot,))[1]
    assert relative_error(timestep_embedding_tangent_ref(t, t_dot, 7, 100.0), expected) < 1e-12


def test_empty(each_route, device):
    t = torch.rand(0, device=device)
    y, y_dot = timestep_embedding_jvp((t,), (t,), 8)
    assert y.shape == y_dot.shape == (0, 8)


T = torch.rand(3)
BAD = [("t", (T[None], 8, 1e4)), ("t", (T.long(), 8, 1e4)), ("t", (T.double(), 8, 1e4)), ("t", (0.5, 8, 1e4)),
       ("dim", (T, 1, 1e4)), ("max_period", (T, 8, 0.0))]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(kernel_route, name, arguments):
    t, dim, max_period = arguments
    for call in (
        lambda: timestep_embedding(t, dim, max_period=max_period),
        lambda: timestep_embedding_jvp((t,), (t,), dim, max_period=max_period),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()
