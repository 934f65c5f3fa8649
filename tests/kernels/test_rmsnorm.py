"""rmsnorm: both doors against fp64, in every regime of widths, lengths and dtypes."""

import dataclasses

import pytest
import torch
from dual_properties import (
    LAYOUTS,
    Case,
    DualProperties,
    assert_as_exact,
    by_routes,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import rmsnorm as plain_rmsnorm
from meanflow_kernels import rmsnorm, rmsnorm_jvp
from meanflow_kernels.rmsnorm import op as module
from meanflow_kernels.rmsnorm.config import FORWARD, SUMS
from meanflow_kernels.rmsnorm.reference import rmsnorm_ref, rmsnorm_tangent_ref

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
WEIGHT = torch.linspace(0.3, 1.7, 24)


def case(out_dtype=None, weight=None):
    """rmsnorm with its out_dtype bound, and its weight where one is given."""
    bound = () if weight is None else (weight,)

    def plain(x, weight):
        # what is exact is not rounded
        return plain_rmsnorm(x, weight, out_dtype=None if x.dtype == F64 else out_dtype)

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
    # many: where two terms cancel, either code may be right by luck
    "two columns": (2, 40, 2, F32, F32, F32),
    "beyond one warp": (1, 2, 1300, F32, F32, F32),
}
GPU_REGIMES = {
    f"{width} x {length}, {'stream ' + str(stream)[6:]}": (3, length, width, stream, F32, BF16)
    for width, length in ((768, 276), (1024, 276), (1024, 17))
    for stream in (F32, BF16)
}


def inputs(batch, length, width, stream, weights, device):
    x, x_dot = torch.randn(2, batch, length, width, device=device).to(stream)
    return x, x_dot, torch.randn(width, device=device).to(weights)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(regime, device)


def check(regime, device):
    *shape, out = regime
    x, x_dot, weight = inputs(*shape, device)
    assert_as_exact(case(out), (x,), (x_dot,), extra=(weight,))
    assert_as_exact(case(out), (x,), (x_dot[-1:],), extra=(weight,), start=len(x) - 1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", GPU_REGIMES.values(), ids=GPU_REGIMES)
def test_kernel_on_the_gpu(kernel_route, device, regime):
    check(regime, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "rows"), [(17, 8), (8, 4)])
def test_a_program_takes_several_rows(kernel_route, device, monkeypatch, length, rows):
    config = dataclasses.replace(FORWARD, fewest_rows=rows, most_rows=rows, stages=2)
    monkeypatch.setattr(module, "FORWARD", config)
    monkeypatch.setattr(module, "BACKWARD", config)
    check((2, length, 40, F32, F32, F32), device)


def test_the_weight_sums_over_all_samples(kernel_route, device, monkeypatch):
    # 24 rows leave 24 partial sums: three rounds
    one = dataclasses.replace(FORWARD, fewest_rows=1, most_rows=1)
    monkeypatch.setattr(module, "BACKWARD", one)
    monkeypatch.setattr(module, "SUMS", dataclasses.replace(SUMS, block_r=8))
    x, dy, weight = inputs(3, 8, 40, F32, F32, device)
    _, dweight = torch.ops.meanflow_kernels.rmsnorm_bwd(x, weight, dy, 1e-6)
    assert relative_error(dweight, (dy * rmsnorm(x, torch.ones_like(weight))).sum((0, 1))) < 1e-6


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    # a norm of fewer columns may cancel, and both routes' rounding with it: REGIMES have those, beside plain torch
    batch, length, width = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 3), (8, 40)))
    x, x_dot, weight = inputs(batch, length, width, F32, F32, device)
    x, x_dot = strided(data.draw(st.sampled_from(LAYOUTS)), x, x_dot)
    weight = torch.stack([weight, weight], 1)[:, 0]
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    x_dot = x_dot[start : start + n]
    reference, kernel = by_routes(lambda: rmsnorm_jvp((x,), (x_dot,), weight, tangent_start=start))
    for expected, found in zip(reference, kernel, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_strided_arguments_are_read_in_place():
    # the last tokens of a sequence, as a network's end takes them
    x, x_dot, weight = (a[:, 2:] if a.dim() > 1 else a for a in inputs(2, 5, 64, F32, F32, "cpu"))
    y = torch.empty(2, 3, 64)
    launch = module.forward_launch(x, weight, y, x_dot, y, 0, 1e-6)
    assert launch.args["x_ptr"] is x and launch.args["x_dot_ptr"] is x_dot and launch.args["weight_ptr"] is weight
    assert launch.args["stride_x_b"] * launch.constexprs["ALIGN"] == 5 * 64 and launch.constexprs["ALIGN"] == 16


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


def test_the_kernel_takes_no_fp64_and_no_empty_row(kernel_route):
    for name, arguments in (("x", (X.double(), W)), ("weight", (X, W.double())), ("x", (X[..., :0], W[:0]))):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            rmsnorm(*arguments)


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
