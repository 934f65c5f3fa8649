"""bias_gelu: the kernel and the reference against fp64, in every regime of shapes and dtypes."""

import dataclasses

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from dual_properties import Case, DualProperties, assert_as_exact, assert_routes_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import bias_gelu as plain_bias_gelu
from meanflow_kernels import bias_gelu, bias_gelu_jvp
from meanflow_kernels.bias_gelu import op as module
from meanflow_kernels.bias_gelu.config import BACKWARD, SUMS
from meanflow_kernels.bias_gelu.reference import bias_gelu_ref, bias_gelu_tangent_ref

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
BIAS = torch.linspace(-2, 2, 24)


FREE = Case(
    op=bias_gelu,
    op_jvp=lambda primals, tangents, bias, **options: bias_gelu_jvp(primals, tangents, bias, **options),
    plain=plain_bias_gelu,
    make=lambda device: None,
)


class TestProperties(DualProperties):
    bias = BIAS.cuda() if torch.cuda.is_available() else BIAS
    case = Case(
        op=lambda x, b=bias: bias_gelu(x, b),
        op_jvp=lambda primals, tangents, b=bias, **options: bias_gelu_jvp(primals, tangents, b, **options),
        plain=lambda x, b=bias: plain_bias_gelu(x, b),
        make=lambda device: ((2 * torch.randn(3, 5, 24, device=device),), (torch.randn(3, 5, 24, device=device),)),
    )


# one row a regime: shape of x, its dtype, dtype of the bias, spread of x
REGIMES = {
    "fp32": ((2, 17, 96), F32, F32, 1.0),
    "fp16, bias in fp32": ((2, 9, 520), F16, F32, 1.0),
    "fp16": ((2, 9, 96), F16, F16, 1.0),
    "hidden width of the xl model": ((1, 2, 4608), F16, F32, 1.0),
    "odd sizes": ((3, 5, 7, 33), F32, F32, 1.0),
    "one column": ((5, 1), F32, F32, 1.0),
    "saturated": ((2, 9, 96), F32, F32, 30.0),
}


def check(shape, dtype, bias_dtype, spread, device, start=None):
    x, x_dot = (spread * torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    bias = torch.randn(shape[-1], device=device).to(bias_dtype)
    x_dot = x_dot if start is None else x_dot[start : start + 1]
    assert_as_exact(FREE, (x,), (x_dot,), extra=(bias,), start=start)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


@pytest.mark.usefixtures("poisoned_empty")
def test_a_slice_is_as_exact_as_plain_torch(each_route, device):
    check((3, 11, 48), F16, F32, 1.0, device, start=1)


GPU_SHAPES = [(4, 256, 4608), (3, 255, 1536), (2, 64, 3072), (1, 1024, 4096), (2, 17, 100)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_kernel_on_the_gpu(kernel_route, device, shape):
    check(shape, BF16, F32, 1.0, device)
    check(shape, BF16, BF16, 1.0, device)


@pytest.mark.parametrize("rows", (1, 8, 9, 300))
def test_the_sum_over_rows_is_cut_into_chunks(kernel_route, device, monkeypatch, rows):
    # 300 rows leave 19 partial sums: three rounds
    monkeypatch.setattr(module, "SUMS", dataclasses.replace(SUMS, block_r=8))
    x, dy = torch.randn(2, rows, 40, device=device)
    bias = torch.randn(40, device=device)
    dx, dbias = torch.ops.meanflow_kernels.bias_gelu_bwd(x, bias, dy)
    assert relative_error(dbias, dx.sum(0)) < 1e-6
    for strips, height in ((1, rows), (9, 10**6)):
        share = BACKWARD.rows_per_program(strips, height, x.device)
        assert share % BACKWARD.block_r == 0 and BACKWARD.fewest_rows <= share <= BACKWARD.most_rows


def test_the_bias_carries_its_tangent_in_forward_mode(each_route, device):
    x, x_dot = torch.randn(2, 2, 3, 24, device=device)
    bias, bias_dot = torch.randn(2, 24, device=device)
    for tangents in ((x_dot, bias_dot), (None, bias_dot)):
        with forward_ad.dual_level():
            duals = [x if v is None else forward_ad.make_dual(x, v) for x, v in zip((x, bias), tangents, strict=True)]
            found = forward_ad.unpack_dual(bias_gelu(*duals)).tangent
            expected = forward_ad.unpack_dual(plain_bias_gelu(*duals)).tangent
        assert relative_error(found, expected) < 1e-6


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) + [data.draw(st.integers(1, 40))]
    x, x_dot = torch.randn(2, *shape, device=device)
    if data.draw(st.booleans()):
        x, x_dot = x.mT.contiguous().mT, x_dot.mT.contiguous().mT
    bias = torch.randn(2 * shape[-1], device=device)[::2]
    n = data.draw(st.integers(1, shape[0]))
    start = data.draw(st.integers(0, shape[0] - n))
    x_dot = x_dot[start : start + n]
    # y = u s with s in (0, 1); y_dot = (s + u s') x_dot, whose factor is 1.1 at most and passes through 0 at u = -0.75
    assert_routes_agree(lambda: bias_gelu_jvp((x,), (x_dot,), bias, tangent_start=start), (x + bias, x_dot))


def test_reference_in_fp64():
    x, x_dot, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (2, 3, 5), (5,)))
    leaves = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(bias_gelu_ref, leaves, check_forward_ad=True)
    expected = torch.func.jvp(lambda x: plain_bias_gelu(x, bias), (x,), (x_dot,))[1]
    assert relative_error(bias_gelu_tangent_ref(x, bias, x_dot), expected) < 1e-12


def test_empty(each_route, device):
    for shape in ((0, 3, 8), (2, 0, 8)):
        x, bias = (torch.randn(size, device=device, requires_grad=True) for size in (shape, 8))
        y, y_dot = bias_gelu_jvp((x,), (x.detach(),), bias)
        assert y.shape == y_dot.shape == shape
        assert torch.autograd.grad(y.sum(), bias)[0].abs().max() == 0


X, V = torch.zeros(2, 3, 8), torch.zeros(8)
BAD = [("x", (V, V)), ("x", ("text", V)), ("bias", (X, V[:7])), ("bias", (X, V.to("meta"))), ("bias", (X, V.double()))]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(kernel_route, name, arguments):
    x, bias = arguments
    for call in (lambda: bias_gelu(x, bias), lambda: bias_gelu_jvp((x,), (x,), bias)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()
