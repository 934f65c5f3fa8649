"""rmsnorm: both doors against fp64, in every regime of widths, lengths and dtypes."""

import pytest
import torch
from dual_properties import LAYOUTS, Case, DualProperties, assert_as_exact, strided
from tolerances import relative_error

from meanflow_kernels.rmsnorm import rmsnorm, rmsnorm_jvp
from meanflow_kernels.rmsnorm.reference import rmsnorm_ref, rmsnorm_tangent_ref

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
WEIGHT = torch.linspace(0.3, 1.7, 24)


def case(out_dtype=None, weight=None):
    """rmsnorm with its out_dtype bound, and its weight where one is given."""
    bound = () if weight is None else (weight,)

    def plain(x, weight):
        h = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(x.dtype)
        return h if x.dtype == F64 else h.to(out_dtype or x.dtype)

    return Case(
        op=lambda x, *w: rmsnorm(x, *(bound or w), out_dtype=out_dtype),
        op_jvp=lambda primals, tangents, *w, **o: rmsnorm_jvp(
            primals, tangents, *(bound or w), out_dtype=out_dtype, **o
        ),
        plain=lambda x, *w: plain(x, *(bound or w)),
        make=lambda device: tuple((x,) for x in torch.randn(2, 3, 2, 24, device=device)),
    )


class TestProperties(DualProperties):
    case = case(weight=WEIGHT.cuda() if torch.cuda.is_available() else WEIGHT)


# one row a regime: B, L, C, dtype of x, of the weight, of y
REGIMES = {
    "xl width, mixed as in training": (1, 3, 1024, F32, F32, F16),
    "xl width, fp32": (1, 2, 1024, F32, F32, F32),
    "base width, all fp16": (1, 2, 768, F16, F16, F16),
    "one token": (3, 1, 64, F32, F16, F16),
    "odd width": (2, 3, 77, F16, F32, F16),
    "two columns": (2, 2, 2, F32, F32, F32),
}


def inputs(batch, length, width, stream, weights, device):
    x, x_dot = torch.randn(2, batch, length, width, device=device).to(stream)
    return x, x_dot, torch.randn(width, device=device).to(weights)


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(reference_route, device, regime):
    *shape, out = regime
    x, x_dot, weight = inputs(*shape, device)
    assert_as_exact(case(out), (x,), (x_dot,), extra=(weight,))
    assert_as_exact(case(out), (x,), (x_dot[-1:],), extra=(weight,), start=len(x) - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_stride(each_route, device, layout):
    x, x_dot, weight = inputs(2, 3, 8, F32, F32, device)
    x, x_dot = strided(layout, x, x_dot)
    found = rmsnorm_jvp((x,), (x_dot,), weight)
    expected = rmsnorm_jvp((x.contiguous(),), (x_dot.contiguous(),), weight)
    assert all(relative_error(y, z) < 1e-6 for y, z in zip(found, expected, strict=True))


def test_reference_in_fp64():
    x, x_dot, weight = inputs(2, 2, 5, F64, F64, "cpu")
    leaves = (x.clone().requires_grad_(), weight.requires_grad_())
    # eps as large as the mean square: the tangent holds with it, not only beside it
    for eps in (1e-6, 1.0):
        assert torch.autograd.gradcheck(lambda *xs, eps=eps: rmsnorm_ref(*xs, eps=eps), leaves, check_forward_ad=True)
        expected = torch.func.jvp(lambda x, eps=eps: rmsnorm_ref(x, weight, eps=eps), (x,), (x_dot,))[1]
        assert relative_error(rmsnorm_tangent_ref(x, weight, x_dot, eps=eps), expected) < 1e-12


def test_an_empty_batch(each_route, device):
    x, weight = torch.zeros(0, 3, 8, device=device), torch.ones(8, device=device)
    y, y_dot = rmsnorm_jvp((x,), (x,), weight)
    assert y.shape == y_dot.shape == (0, 3, 8)


X, W = torch.zeros(2, 3, 8), torch.ones(8)
BAD = [
    ("x", (X[0], W)),
    ("x", ("text", W)),
    ("x", (X.long(), W)),
    ("weight", (X, W[:7])),
    ("weight", (X, W.long())),
    ("weight", (X, W.to("meta"))),
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(each_route, name, arguments):
    x, weight = arguments
    for call in (lambda: rmsnorm(x, weight), lambda: rmsnorm_jvp((x,), (X,), weight)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()


def test_a_tangent_of_the_weight_is_not_dropped(each_route):
    with pytest.raises(ValueError, match="^weight: got a tensor with a forward-mode tangent"):
        torch.func.jvp(lambda weight: rmsnorm(X, weight), (W,), (W,))
