"""gate_rmsnorm: both doors against fp64, in every regime of widths, lengths and dtypes."""

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

from benchmarks.workloads.plain import gate_rmsnorm as plain_gate_rmsnorm
from meanflow_kernels import gate_rmsnorm, gate_rmsnorm_jvp
from meanflow_kernels.gate_rmsnorm import op as module
from meanflow_kernels.gate_rmsnorm.config import FORWARD, SUMS
from meanflow_kernels.gate_rmsnorm.reference import gate_rmsnorm_ref, gate_rmsnorm_tangent_ref
from meanflow_kernels.rmsnorm import rmsnorm

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
VECTORS = torch.linspace(-1, 1, 24), torch.linspace(0.3, 1.7, 24)


def case(out_dtype=None, vectors=()):
    """gate_rmsnorm with its out_dtype bound, and gate and weight where they are given."""

    def plain(x, *others):
        # what is exact is not rounded
        return plain_gate_rmsnorm(x, *others, out_dtype=None if x.dtype == F64 else out_dtype)

    def op_jvp(primals, tangents, *others, **options):
        return gate_rmsnorm_jvp(primals, tangents, *(vectors or others), out_dtype=out_dtype, **options)

    return Case(
        op=lambda x, y, *others: gate_rmsnorm(x, y, *(vectors or others), out_dtype=out_dtype),
        op_jvp=op_jvp,
        plain=lambda x, y, *others: plain(x, y, *(vectors or others)),
        make=lambda device: tuple(tuple(xs) for xs in torch.randn(2, 2, 3, 2, 24, device=device)),
    )


class TestProperties(DualProperties):
    case = case(vectors=tuple(x.cuda() if torch.cuda.is_available() else x for x in VECTORS))


# one row a regime: B, L, C, dtype of x, of y, of gate and weight, of h
REGIMES = {
    "xl width, mixed as in training": (1, 3, 1024, F32, F16, F32, F16),
    "xl width, fp32": (1, 2, 1024, F32, F32, F32, F32),
    "base width, all fp16": (1, 2, 768, F16, F16, F16, F16),
    "one token": (3, 1, 64, F32, F32, F16, F16),
    "odd width": (2, 3, 77, F16, F32, F32, F16),
    "beyond one warp": (1, 2, 1300, F32, F32, F32, F32),
}
GPU_REGIMES = {
    f"{width} x {length}, {'stream ' + str(stream)[6:]}": (3, length, width, stream, BF16, F32, BF16)
    for width, length in ((768, 276), (1024, 276), (1024, 17))
    for stream in (F32, BF16)
}


def inputs(batch, length, width, stream, branch, vectors, device):
    """(x, y), their tangents, (gate, weight)."""
    (x, x_dot), (y, y_dot) = torch.randn(2, 2, batch, length, width, device=device)
    gate, weight = torch.randn(2, width, device=device).to(vectors)
    return (x.to(stream), y.to(branch)), (x_dot.to(stream), y_dot.to(branch)), (gate, weight)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(regime, device)


def check(regime, device):
    *shape, out = regime
    primals, tangents, vectors = inputs(*shape, device)
    assert_as_exact(case(out), primals, tangents, extra=vectors)
    start = len(primals[0]) - 1
    assert_as_exact(case(out), primals, tuple(x[-1:] for x in tangents), extra=vectors, start=start)


@pytest.mark.parametrize("used", ("x_out", "h"))
def test_one_result_alone_is_differentiated(each_route, device, used):
    primals, _, vectors = inputs(2, 3, 24, F32, F32, F32, device)
    gradients = []
    for function in (gate_rmsnorm, case().plain):
        leaves = tuple(x.clone().requires_grad_() for x in (*primals, *vectors))
        out = function(*leaves)[("x_out", "h").index(used)]
        gradients.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    for ours, plain in zip(*gradients, strict=True):
        expected = torch.zeros_like(ours) if plain is None and ours is not None else plain
        assert ours is expected is None or relative_error(ours, expected) < 1e-5


def test_it_is_the_sum_and_then_rmsnorm(each_route, device):
    (x, y), _, (gate, weight) = inputs(2, 3, 24, F32, F32, F32, device)
    x_out, h = gate_rmsnorm(x, y, gate, weight)
    assert relative_error(x_out, x + gate * y) < 1e-6
    assert relative_error(h, rmsnorm(x_out, weight)) < 1e-6


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", GPU_REGIMES.values(), ids=GPU_REGIMES)
def test_kernel_on_the_gpu(kernel_route, device, regime):
    check(regime, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "rows"), [(11, 4)])
def test_a_program_takes_several_rows(kernel_route, device, monkeypatch, length, rows):
    config = dataclasses.replace(FORWARD, fewest_rows=rows, most_rows=rows, stages=2)
    monkeypatch.setattr(module, "FORWARD", config)
    monkeypatch.setattr(module, "BACKWARD", config)
    check((2, length, 40, F32, F32, F32, F32), device)


def test_the_parameters_sum_over_all_samples(kernel_route, device, monkeypatch):
    # 24 rows leave 24 partial sums: three rounds
    monkeypatch.setattr(module, "BACKWARD", dataclasses.replace(FORWARD, fewest_rows=1, most_rows=1))
    monkeypatch.setattr(module, "SUMS", dataclasses.replace(SUMS, block_r=8))
    check((3, 8, 40, F32, F32, F32, F32), device)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    # a norm of fewer columns may cancel, and both routes' rounding with it: REGIMES have those, beside plain torch
    batch, length, width = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 3), (8, 40)))
    primals, tangents, vectors = inputs(batch, length, width, F32, F32, F32, device)
    x, y, *tangents = strided(data.draw(st.sampled_from(LAYOUTS)), *primals, *tangents)
    vectors = tuple(torch.stack([v, v], 1)[:, 0] for v in vectors)
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    present = data.draw(st.lists(st.booleans(), min_size=2, max_size=2).filter(any))
    tangents = tuple(a[start : start + n] if p else None for a, p in zip(tangents, present, strict=True))
    reference, kernel = by_routes(lambda: gate_rmsnorm_jvp((x, y), tangents, *vectors, tangent_start=start))
    for expected, found in zip((*reference[0], *reference[1]), (*kernel[0], *kernel[1]), strict=True):
        assert relative_error(found, expected) < 2e-6


def test_strided_arguments_are_read_in_place():
    # the last tokens of a sequence, as a network's end takes them
    primals, tangents, vectors = inputs(2, 5, 64, F32, F16, F32, "cpu")
    x, y, y_dot = (a[:, 2:] for a in (*primals, tangents[1]))
    out = torch.empty(2, 3, 64), torch.empty(2, 3, 64, dtype=F16)
    launch = module.forward_launch((x, y), (None, y_dot), *vectors, out, out, 0, 1e-6)
    for name, tensor in {"x": x, "y": y, "gate": vectors[0], "weight": vectors[1], "y_dot": y_dot}.items():
        assert launch.args[f"{name}_ptr"] is tensor
    assert launch.args["x_dot_ptr"] is None
    assert launch.args["stride_y_b"] * launch.constexprs["ALIGN"] == 5 * 64 and launch.constexprs["ALIGN"] == 16


def test_reference_in_fp64():
    primals, tangents, vectors = inputs(2, 2, 5, F64, F64, F64, "cpu")
    leaves = tuple(x.clone().requires_grad_() for x in (*primals, *vectors))
    assert torch.autograd.gradcheck(lambda *xs: gate_rmsnorm_ref(*xs, eps=1e-6), leaves, check_forward_ad=True)
    expected = torch.func.jvp(lambda *xs: case().plain(*xs, *vectors), primals, tangents)[1]
    for found, exact in zip(gate_rmsnorm_tangent_ref(primals, tangents, *vectors, eps=1e-6), expected, strict=True):
        assert relative_error(found, exact) < 1e-12


X, V = torch.zeros(2, 3, 8), torch.ones(8)
BAD = [
    ("x", (X[0], X, V, V)),
    ("y", (X, X[:, :2], V, V)),
    ("y", (X, X.to("meta"), V, V)),
    ("y", (X, X.long(), V, V)),
    ("gate", (X, X, X[:, 0], V)),
    ("weight", (X, X, V, V[:7])),
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(each_route, name, arguments):
    x, y, *vectors = arguments
    for call in (lambda: gate_rmsnorm(*arguments), lambda: gate_rmsnorm_jvp((x, y), (X, None), *vectors)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()


@pytest.mark.parametrize("name", ("gate", "weight"))
def test_a_tangent_of_a_parameter_is_not_dropped(each_route, name):
    with pytest.raises(ValueError, match=f"^{name}: got a tensor with a forward-mode tangent"):
        torch.func.jvp(lambda v: gate_rmsnorm(X, X, **{"gate": V, "weight": V, name: v}), (V,), (V,))
