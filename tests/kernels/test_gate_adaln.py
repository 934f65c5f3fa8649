"""gate_adaln: the kernel and the reference against fp64, in every regime of widths, lengths and dtypes."""

import dataclasses

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from dual_properties import (
    LAYOUTS,
    Case,
    DualProperties,
    assert_as_exact,
    assert_one_column,
    by_routes,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import gate_adaln as plain_gate_adaln
from meanflow_kernels import adaln, gate_adaln, gate_adaln_jvp
from meanflow_kernels.gate_adaln import op as module
from meanflow_kernels.gate_adaln.config import FORWARD, SUMS
from meanflow_kernels.gate_adaln.reference import gate_adaln_ref, gate_adaln_tangent_ref

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


def make(batch, length, width, stream, branch, vectors, device):
    """(x, y, gate, shift, scale) and their tangents; the vectors are chunks of a (B, 6 C) projection."""

    def one():
        x, y = torch.randn(2, batch, length, width, device=device)
        gate, shift, scale = torch.randn(batch, 6 * width, device=device).to(vectors).chunk(6, -1)[2:5]
        return x.to(stream), y.to(branch), gate, shift, scale

    return one(), one()


def case(out_dtype=None, bias=None):
    """gate_adaln with its out_dtype bound, and its bias unless one follows the primals."""

    def plain(*inputs):
        # what is exact is not rounded
        exact = inputs[0].dtype == torch.float64
        return plain_gate_adaln(*inputs, out_dtype=None if exact else out_dtype)

    def op_jvp(primals, tangents, bias=bias, **options):
        return gate_adaln_jvp(primals, tangents, bias=bias, out_dtype=out_dtype, **options)

    return Case(
        op=lambda *primals: gate_adaln(*primals, bias=bias, out_dtype=out_dtype),
        op_jvp=op_jvp,
        plain=plain if bias is None else lambda *primals, bias=bias: plain(*primals, bias),
        make=lambda device: make(3, 1, 24, F32, F32, F32, device),
    )


class TestProperties(DualProperties):
    case = case()


class TestPropertiesWithBias(DualProperties):
    case = case(bias=torch.linspace(-2, 2, 24, device="cuda" if torch.cuda.is_available() else "cpu"))


# one row a regime: B, L, C, dtype of x, of y, of the vectors, of h
REGIMES = {
    "xl width, mixed as in training": (1, 3, 1152, F32, F16, F16, F16),
    "xl width, fp32": (1, 2, 1152, F32, F32, F32, F32),
    "large width, all fp16": (1, 2, 1024, F16, F16, F16, F16),
    "base width": (1, 2, 768, F32, F16, F32, F16),
    "small width": (1, 2, 384, F16, F32, F32, F32),
    "one token": (3, 1, 64, F32, F32, F32, F16),
    "odd width": (2, 3, 77, F16, F16, F16, F16),
    "no alignment": (2, 3, 33, F32, F16, F32, F32),
    "beyond one warp": (1, 2, 1300, F32, F32, F32, F32),
}
GPU_REGIMES = {
    f"{width} x {length}, {'stream ' + str(stream)[6:]}": (3, length, width, stream, BF16, BF16, BF16)
    for width, length in ((384, 255), (768, 64), (1024, 1024), (1152, 256), (1152, 17))
    for stream in (F32, BF16)
}


def check(batch, length, width, stream, branch, vectors, out, device, **options):
    primals, tangents = make(batch, length, width, stream, branch, vectors, device)
    assert_as_exact(case(out), primals, tangents, **options)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


# samples, tokens, width, dtypes of stream, branch, vectors and h, of the bias
BIASED = {
    "xl width, mixed as in training": (2, 3, 1152, F32, F16, F16, F16, F32),
    "a program's sums of several rows": (3, 33, 40, F32, F32, F32, F32, F32),
    "odd width, bias in fp16": (2, 3, 77, F16, F16, F16, F16, F16),
    "one sample": (1, 5, 600, F32, F32, F32, F32, F32),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", BIASED.values(), ids=BIASED)
def test_with_a_bias_as_exact_as_plain_torch(each_route, device, regime):
    *rest, bias_dtype = regime
    check(*rest, device, extra=(torch.randn(rest[2], device=device).to(bias_dtype),))


@pytest.mark.parametrize("samples", (1, 3, 40))
def test_the_sum_over_samples_is_cut_into_strips(kernel_route, device, monkeypatch, samples):
    monkeypatch.setattr(module, "SUMS", dataclasses.replace(SUMS, block_r=2, block_c=64))
    (x, y, gate, _, scale), _ = make(samples, 2, 70, F32, F32, F32, device)
    backward = torch.ops.meanflow_kernels.gate_adaln_bwd
    _, dy, *_, dbias = backward(x, y, gate, scale, torch.randn(70, device=device), x, y, 1e-6)
    assert relative_error(dbias, dy.double().sum((0, 1))) < 1e-6


def test_the_bias_carries_its_tangent_in_forward_mode(each_route, device):
    primals, tangents = make(2, 3, 24, F32, F32, F32, device)
    bias, bias_dot = torch.randn(2, 24, device=device)
    for some in ((None, tangents[1]), (None, None), tangents[:2]):
        with forward_ad.dual_level():
            pairs = zip((*primals, bias), (*some, *[None] * 3, bias_dot), strict=True)
            *duals, bias_dual = (x if x_dot is None else forward_ad.make_dual(x, x_dot) for x, x_dot in pairs)
            found = gate_adaln(*duals, bias=bias_dual)
            expected = plain_gate_adaln(*duals, bias_dual)
            for y, exact in zip(found, expected, strict=True):
                assert relative_error(forward_ad.unpack_dual(y).tangent, forward_ad.unpack_dual(exact).tangent) < 1e-6
            with pytest.raises(ValueError, match="^bias: got a tensor with a forward-mode tangent"):
                gate_adaln_jvp(primals, tangents, bias=bias_dual)


@pytest.mark.usefixtures("poisoned_empty")
def test_one_column(each_route, device):
    assert_one_column(case(), lambda: make(2, 2, 1, F32, F32, F32, device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", GPU_REGIMES.values(), ids=GPU_REGIMES)
def test_kernel_on_the_gpu(kernel_route, device, regime):
    check(*regime, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "rows"), [(11, 4)])
def test_a_program_takes_several_rows(kernel_route, device, monkeypatch, length, rows):
    config = dataclasses.replace(FORWARD, fewest_rows=rows, most_rows=rows, stages=2)
    monkeypatch.setattr(module, "FORWARD", config)
    monkeypatch.setattr(module, "BACKWARD", config)
    check(1, length, 40, F32, F32, F32, F32, device)


@pytest.mark.parametrize("used", ("x_out", "h"))
def test_one_result_alone_is_differentiated(each_route, device, used):
    primals, _ = make(2, 3, 24, F32, F32, F32, device)
    gradients = []
    for function in (gate_adaln, case().plain):
        leaves = tuple(x.clone().requires_grad_() for x in primals)
        out = function(*leaves)[("x_out", "h").index(used)]
        gradients.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
    for ours, plain in zip(*gradients, strict=True):
        expected = torch.zeros_like(ours) if plain is None and ours is not None else plain
        assert ours is expected is None or relative_error(ours, expected) < 1e-5


def test_it_is_the_sum_and_then_adaln(each_route, device):
    (x, y, gate, shift, scale), _ = make(2, 3, 24, F32, F32, F32, device)
    x_out, h = gate_adaln(x, y, gate, shift, scale)
    assert relative_error(x_out, x + gate[:, None] * y) < 1e-6
    assert relative_error(h, adaln(x_out, shift, scale)) < 1e-6


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    # a norm of fewer columns may cancel, and both routes' rounding with it: REGIMES have those, beside plain torch
    batch, length, width = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 3), (8, 40)))
    four = torch.randn(4, batch, length, width, device=device)
    x, y, x_dot, y_dot = strided(data.draw(st.sampled_from(LAYOUTS)), *four)
    vectors = torch.randn(6, batch, 2 * width, device=device)[..., 1 : width + 1]
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    present = data.draw(st.lists(st.booleans(), min_size=5, max_size=5).filter(any))
    tangents = tuple(
        x[start : start + n] if p else None for x, p in zip((x_dot, y_dot, *vectors[3:]), present, strict=True)
    )
    primals = (x, y, *vectors[:3])
    reference, kernel = by_routes(lambda: gate_adaln_jvp(primals, tangents, tangent_start=start))
    for expected, found in zip((*reference[0], *reference[1]), (*kernel[0], *kernel[1]), strict=True):
        assert relative_error(found, expected) < 2e-6


def test_strided_arguments_are_read_in_place():
    primals, tangents = make(2, 3, 64, F32, F16, F16, "cpu")
    x, h = torch.empty(2, 3, 64), torch.empty(2, 3, 64, dtype=F16)
    launch = module.forward_launch(primals, None, (None, *tangents[1:]), (x, h), (x, h), 0, 1e-6)
    for name, tensor in zip(("x", "y", "gate", "shift", "scale"), primals, strict=True):
        assert launch.args[f"{name}_ptr"] is tensor
    assert launch.args["x_dot_ptr"] is None and launch.args["y_dot_ptr"] is tangents[1]
    assert launch.args["stride_gate_b"] * launch.constexprs["ALIGN"] == 6 * 64 and launch.constexprs["ALIGN"] == 16


def test_reference_in_fp64():
    primals, tangents = make(2, 2, 5, *[torch.float64] * 3, "cpu")
    leaves = tuple(x.clone().requires_grad_() for x in primals)
    biases = (None, torch.randn(5, dtype=torch.float64, requires_grad=True))
    for bias in biases:
        inputs = (*leaves, bias)
        assert torch.autograd.gradcheck(lambda *xs: gate_adaln_ref(*xs, eps=1e-6), inputs, check_forward_ad=True)
        expected = torch.func.jvp(lambda *xs, bias=bias: plain_gate_adaln(*xs, bias), primals, tangents)[1]
        for found, exact in zip(gate_adaln_tangent_ref(primals, tangents, bias, eps=1e-6), expected, strict=True):
            assert relative_error(found, exact) < 1e-12


X, V = torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD = [
    ("x", (X[0], X, V, V, V)),
    ("y", (X, X[:, :2], V, V, V)),
    ("y", (X, X.to("meta"), V, V, V)),
    ("gate", (X, X, V[:1], V, V)),
    ("shift", (X, X, V, V[:, :7], V)),
    ("scale", (X, X, V, V, V.half())),
    ("y", (X, X.double(), V, V, V)),
]


BAD_BIASES = (torch.zeros(7), torch.zeros(2, 8), torch.zeros(8, device="meta"), torch.zeros(8).double(), V[0].long())


@pytest.mark.parametrize("bias", BAD_BIASES, ids=str)
def test_a_wrong_bias_raises(kernel_route, bias):
    for call in (gate_adaln, lambda *xs, bias: gate_adaln_jvp(xs, (X, *[None] * 4), bias=bias)):
        with pytest.raises(ValueError, match=r"^bias: got .*, wanted .*; "):
            call(X, X, V, V, V, bias=bias)


@pytest.mark.parametrize(("name", "primals"), BAD)
def test_wrong_arguments_raise(kernel_route, name, primals):
    tangents = (None, None, None, torch.zeros_like(primals[3]), None)
    for call in (lambda: gate_adaln(*primals), lambda: gate_adaln_jvp(primals, tangents)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()
