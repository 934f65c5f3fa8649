"""Launches decided once: what a later call of a kind passes is what Triton would, and who has to be built again."""

import subprocess
import sys
from types import SimpleNamespace

import fresh
import pytest
import torch
import triton

from meanflow_kernels import kinds, plans
from meanflow_kernels.launch import Launch
from meanflow_kernels.plans import run


class Kernel:
    """A kernel y = a x: Triton's launches of it, and those that pass it by."""

    params = [SimpleNamespace(name=name) for name in ("x_ptr", "y_ptr", "room_ptr", "a", "BLOCK")]

    def __init__(self):
        self.by_triton, self.by_plan = [], []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.by_triton.append(arguments)
            return SimpleNamespace(run=lambda *passed: self.by_plan.append(passed), function=7, packed_metadata=(4, 1))

        return launch

    def build(self, x, y, a=1.0, block=8):
        room = torch.empty(3, dtype=torch.float64)
        args = {"x_ptr": x.contiguous(), "y_ptr": y[None], "room_ptr": room, "a": a}
        yield Launch(self, (2, 3), args, {"BLOCK": block}, 4, 1, scratch=room)


class Driver:
    device, stream = -1, 5

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    triton.runtime.driver.set_active(Driver())
    yield Kernel()
    triton.runtime.driver.set_active(None)


def pair(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


def test_the_second_call_passes_addresses_alone(kernel):
    run(kernel.build, *pair(4, 4), 2.0)
    x, y = pair(4, 4)
    run(kernel.build, x, y, 2.0)
    assert len(kernel.by_triton) == len(kernel.by_plan) == 1
    *launch, room, a, block = kernel.by_plan[0]
    assert launch == [2, 3, 1, Driver.stream, 7, (4, 1), None, None, None, x.data_ptr(), y.data_ptr()]
    # room of its own
    assert (a, block) == (2.0, 8) and room not in (x.data_ptr(), y.data_ptr(), 0)
    assert room % 16 == 0


def test_what_decides_is_part_of_the_kind(kernel):
    x, y = pair(4, 4)
    half = pair(4, 4, dtype=torch.float16)
    calls = [(x, y), (x, y.t()), (*pair(4, 8),), half, (x, half[1]), (x, y, 2.0), (x, y, 2.0, 16)]
    for call in calls:
        run(kernel.build, *call)
    assert len(kernel.by_triton) == len(calls) and not kernel.by_plan
    for call in calls:
        run(kernel.build, *call)
    assert len(kernel.by_triton) == len(kernel.by_plan) == len(calls)
    run(Kernel().build, x, y)
    assert len(kernel.by_plan) == len(calls)


def test_an_address_off_the_grid_goes_to_triton(kernel):
    x, y = pair(4, 4)
    off = torch.zeros(17)[1:].view(4, 4)
    for _ in range(2):
        run(kernel.build, off, y)
    assert len(kernel.by_triton) == 2
    for _ in range(2):
        run(kernel.build, x, y)
    run(kernel.build, x, off)
    assert len(kernel.by_triton) == 4 and len(kernel.by_plan) == 1


def test_a_copy_and_one_tensor_twice_are_built_each_time(kernel):
    x, y = pair(4, 4)
    for call in ((x.t(), y), (x.t(), y), (x, x), (x, x)):
        run(kernel.build, *call)
    assert len(kernel.by_triton) == 4 and not kernel.by_plan
    # what is told apart once serves one tensor twice
    run(kernel.build, x, y)
    run(kernel.build, x, x)
    assert kernel.by_plan[0][9:11] == (x.data_ptr(),) * 2


@pytest.mark.parametrize("name", ("launch_enter_hook", "launch_exit_hook"))
def test_hooks_see_every_launch(kernel, monkeypatch, name):
    for _ in range(2):
        run(kernel.build, *pair(4, 4))
    chain = getattr(triton.knobs.runtime, name)
    chain.add(print)
    try:
        run(kernel.build, *pair(4, 4))
    finally:
        chain.remove(print)
    assert len(kernel.by_triton) == 2
    for hook, launches in ((print, 3), (None, 3)):
        monkeypatch.setattr(triton.knobs.runtime, name, hook)
        run(kernel.build, *pair(4, 4))
        assert len(kernel.by_triton) == launches


def test_the_stream_is_the_current_one_of_the_tensors_device(kernel, monkeypatch):
    for stream in (5, 6, 7):
        monkeypatch.setattr(Driver, "stream", stream)
        run(kernel.build, *pair(4, 4))
    assert [passed[3] for passed in kernel.by_plan] == [6, 7]
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or torch.no_grad())
    monkeypatch.setattr(Driver, "device", 1)
    run(kernel.build, *pair(4, 4))
    assert entered == [-1] and len(kernel.by_plan) == 3


def test_the_interpreter_and_other_tritons_launch_themselves(kernel):
    class Interpreted(Kernel):
        def __getitem__(self, grid):
            launch = super().__getitem__(grid)
            return lambda **arguments: launch(**arguments) and None

    interpreted = Interpreted()
    for _ in range(2):
        run(interpreted.build, *pair(4, 4))
    assert len(interpreted.by_triton) == 2 and not plans._plans


def test_not_more_is_kept_than_a_limit(kernel, monkeypatch):
    monkeypatch.setattr(kinds, "MOST_KINDS", 3)
    for n in range(1, 8):
        run(kernel.build, *pair(4, n))
        assert len(plans._plans) <= 3


EVERY_OPERATOR = """
import sys
sys.path[:0] = {paths!r}
import torch
from benchmarks.harness.launching import nothing_launched
from meanflow_kernels import kinds, plans
from test_opcheck import FOLDERS

launches, built, build = [], [], plans._build


def note(function, operands, *rest):
    built.append((function, operands))
    build(function, operands, *rest)


def apart(x):
    # in memory of its own, as another call's tensors are
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, torch.Tensor) else x


def dense(x):
    return torch.empty(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x


def launched(function, operands):
    launches.clear()
    plans.run(function, *operands)
    return [(*passed[:6], *passed[9:]) for passed in launches]


planned = set()
with nothing_launched(lambda *passed: launches.append(passed)), torch.no_grad():
    for folder in FOLDERS:
        for name, _, arguments in folder("cpu") if folder.__name__ not in ("join", "adamw_ema") else ():
            built.clear()
            plans._plans.clear()
            plans._build = note
            for form in (apart, dense):
                getattr(torch.ops.meanflow_kernels, name)(*map(form, arguments))
            plans._build = build
            by_plans = [launched(*call) for call in built]
            for (function, operands), by_plan in zip(built, by_plans):
                plans._plans.clear()
                by_triton = launched(function, operands)
                if not plans._plans:
                    continue
                planned.add(name)
                tensors = []
                plans._describe(operands, [], tensors)
                addresses = [x.data_ptr() for x in tensors]
                assert len(by_plan) == len(by_triton) > 0
                for one, other in zip(by_plan, by_triton):
                    assert len(one) == len(other)
                    for got, wanted in zip(one, other):
                        if isinstance(wanted, torch.Tensor):
                            assert not isinstance(got, torch.Tensor)
                            # the scratch is new in each call
                            wanted = got if wanted.data_ptr() not in addresses else wanted.data_ptr()
                        assert type(got) is type(wanted) and got == wanted, (name, got, wanted)
print(*sorted(planned))
"""


def test_a_plan_launches_what_triton_launches():
    """Of every operator, with real kernels whose launch is noted instead of made."""
    paths = [str(fresh.ROOT / part) for part in ("tests", "tests/kernels")]
    command = [sys.executable, "-c", EVERY_OPERATOR.format(paths=paths)]
    done = subprocess.run(command, env=fresh.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "meanflow_kernels::" in name}
    assert set(done.stdout.split()) == names - {"join", "adamw_ema"}
