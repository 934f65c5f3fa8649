"""swiglu: both doors against fp64."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact
from tolerances import relative_error

from meanflow_kernels.swiglu import swiglu, swiglu_jvp
from meanflow_kernels.swiglu.reference import swiglu_ref, swiglu_tangent_ref

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def plain(x):
    a, b = x.chunk(2, -1)
    return torch.nn.functional.silu(a) * b


CASE = Case(
    op=swiglu,
    op_jvp=swiglu_jvp,
    plain=plain,
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


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(reference_route, device, regime):
    shape, dtype, spread = regime
    x, x_dot = (spread * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    assert_as_exact(CASE, (x,), (x_dot,))
    assert_as_exact(CASE, (x,), (x_dot[-1:],), start=len(x) - 1)


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
    expected = torch.func.jvp(plain, (x,), (x_dot,))[1]
    assert relative_error(swiglu_tangent_ref(x, x_dot), expected) < 1e-12


BAD = ["text", torch.zeros(4), torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64)]


@pytest.mark.parametrize("x", BAD, ids=str)
def test_wrong_arguments_raise(each_route, x):
    for call in (lambda: swiglu(x), lambda: swiglu_jvp((x,), (x,))):
        with pytest.raises(ValueError, match="^x: got .*, wanted .*; "):
            call()
