"""silu: the kernel and the reference against fp64."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact, assert_routes_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from meanflow_kernels import silu, silu_jvp
from meanflow_kernels.silu.reference import silu_ref, silu_tangent_ref

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
CASE = Case(
    op=silu,
    op_jvp=silu_jvp,
    plain=torch.nn.functional.silu,
    make=lambda device: ((2 * torch.randn(3, 24, device=device),), (torch.randn(3, 24, device=device),)),
)


class TestProperties(DualProperties):
    case = CASE


REGIMES = {
    "conditioning, fp32": ((4, 1152), F32, 1.0),
    "conditioning, fp16": ((4, 1152), F16, 1.0),
    "odd sizes": ((3, 5, 77), F16, 1.0),
    "a vector": ((7,), F32, 1.0),
    "saturated": ((3, 100), F32, 30.0),
}


def check(shape, dtype, spread, device):
    x, x_dot = (spread * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    assert_as_exact(CASE, (x,), (x_dot,))
    if shape[0] > 2:
        assert_as_exact(CASE, (x,), (x_dot[1:2],), start=1)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(64, 1152), (33, 768), (256, 1024, 17)], ids=str)
def test_kernel_on_the_gpu(kernel_route, device, shape):
    check(shape, BF16, 1.0, device)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    x, x_dot = torch.randn(2, *shape, device=device)
    if data.draw(st.booleans()):
        x, x_dot = (a.movedim(0, -1).contiguous().movedim(-1, 0) for a in (x, x_dot))
    n = data.draw(st.integers(1, shape[0]))
    start = data.draw(st.integers(0, shape[0] - n))
    x_dot = x_dot[start : start + n]
    # y = x s with s in (0, 1); y_dot = (s + x s') x_dot, whose factor is 1.1 at most and passes through 0 at x = -1.28
    assert_routes_agree(lambda: silu_jvp((x,), (x_dot,), tangent_start=start), (x, x_dot))


def test_reference_in_fp64():
    x, x_dot = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(silu_ref, (x.clone().requires_grad_(),), check_forward_ad=True)
    expected = torch.func.jvp(torch.nn.functional.silu, (x,), (x_dot,))[1]
    assert relative_error(silu_tangent_ref(x, x_dot), expected) < 1e-12


def test_empty(each_route, device):
    y, y_dot = silu_jvp((torch.randn(0, 3, device=device),), (torch.randn(0, 3, device=device),))
    assert y.shape == y_dot.shape == (0, 3)


BAD = ["text", torch.zeros(()), torch.zeros(3, dtype=torch.int64), torch.zeros(3).double()]


@pytest.mark.parametrize("x", BAD, ids=str)
def test_wrong_arguments_raise(kernel_route, x):
    for call in (lambda: silu(x), lambda: silu_jvp((x,), (x,))):
        with pytest.raises(ValueError, match="^x: got .*, wanted .*; "):
            call()
