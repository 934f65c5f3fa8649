"""swiglu: both doors against fp64."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact, assert_routes_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import swiglu as plain_swiglu
from meanflow_kernels import swiglu, swiglu_jvp
from meanflow_kernels.swiglu import op as module
from meanflow_kernels.swiglu.config import FlatConfig
from meanflow_kernels.swiglu.reference import swiglu_ref, swiglu_tangent_ref

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16

CASE = Case(
    op=swiglu,
    op_jvp=swiglu_jvp,
    plain=plain_swiglu,
    make=lambda device: tuple((x,) for x in 2 * torch.randn(2, 3, 5, 24, device=device)),
)


class TestProperties(DualProperties):
    case = CASE


REGIMES = {
    "hidden width of the base model, fp16": ((1, 3, 2 * 2048), F16, 1.0),
    "hidden width of the xl model, padded": ((1, 2, 2 * 2736), F32, 1.0),
    "hidden width of the xl model": ((1, 2, 2 * 2730), F32, 1.0),
    "odd sizes": ((3, 5, 7, 66), F16, 1.0),
    "one column": ((5, 2), F32, 1.0),
    "saturated": ((3, 100), F32, 30.0),
}
GPU_SHAPES = [(4, 276, 2 * 2736), (3, 276, 2 * 2048), (2, 17, 2 * 2730), (3, 5, 2 * 33)]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


def check(shape, dtype, spread, device):
    x, x_dot = (spread * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    assert_as_exact(CASE, (x,), (x_dot,))
    assert_as_exact(CASE, (x,), (x_dot[-1:],), start=len(x) - 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_kernel_on_the_gpu(kernel_route, device, shape):
    check(shape, BF16, 1.0, device)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)) + [2 * data.draw(st.integers(1, 40))]
    x, x_dot = torch.randn(2, *shape, device=device)
    if data.draw(st.booleans()):
        x, x_dot = (a.movedim(0, -1).contiguous().movedim(-1, 0) for a in (x, x_dot))
    n = data.draw(st.integers(1, shape[0]))
    start = data.draw(st.integers(0, shape[0] - n))
    x_dot = x_dot[start : start + n]
    # y = silu(a) b and |silu(a)| < |a|; y_dot = silu'(a) a_dot b + silu(a) b_dot, silu' 1.1 at most, through 0 at -1.28
    (a, b), (a_dot, b_dot) = x.chunk(2, -1), x_dot.chunk(2, -1)
    some = slice(start, start + n)
    sizes = (a * b, torch.stack([a_dot * b[some], a[some] * b_dot]))
    assert_routes_agree(lambda: swiglu_jvp((x,), (x_dot,), tangent_start=start), sizes)


def test_a_row_of_many_programs_and_a_program_of_many_rows(kernel_route, device, monkeypatch):
    for block, shape in ((16, (2, 3, 96)), (2048, (5, 7, 6))):
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(module, name, FlatConfig(block=block, num_warps=4))
        check(shape, F32, 1.0, device)


def test_padding_is_exact(each_route, device):
    """Columns of zeros give zeros, and take no gradient from where they end."""
    x = torch.randn(2, 3, 10, device=device)
    padded = torch.cat([torch.nn.functional.pad(half, (0, 3)) for half in x.chunk(2, -1)], -1).requires_grad_()
    y = swiglu(padded)
    assert torch.equal(y[..., :5], swiglu(x)) and y[..., 5:].abs().max() == 0
    (gradient,) = torch.autograd.grad(y.sum(), padded)
    assert all(half[..., 5:].abs().max() == 0 for half in gradient.chunk(2, -1))


def test_reference_in_fp64():
    x, x_dot = torch.randn(2, 3, 6, dtype=F64)
    assert torch.autograd.gradcheck(swiglu_ref, (x.clone().requires_grad_(),), check_forward_ad=True)
    expected = torch.func.jvp(plain_swiglu, (x,), (x_dot,))[1]
    assert relative_error(swiglu_tangent_ref(x, x_dot), expected) < 1e-12


def test_empty(each_route, device):
    for shape in ((0, 3, 8), (2, 0, 8)):
        x = torch.randn(shape, device=device)
        y, y_dot = swiglu_jvp((x,), (x,))
        assert y.shape == y_dot.shape == (*shape[:-1], 4)


def test_the_kernel_takes_no_fp64(kernel_route, device):
    with pytest.raises(ValueError, match="^x: got torch.float64, wanted bfloat16, float16 or float32; "):
        swiglu(torch.zeros(3, 4, dtype=F64, device=device))


BAD = ["text", torch.zeros(4), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64)]


@pytest.mark.parametrize("x", BAD, ids=str)
def test_wrong_arguments_raise(each_route, x):
    for call in (lambda: swiglu(x), lambda: swiglu_jvp((x,), (x,))):
        with pytest.raises(ValueError, match="^x: got .*, wanted .*; "):
            call()
