"""adaln: the kernel and the reference against fp64, in every regime of widths, lengths and dtypes."""

import dataclasses

import pytest
import torch
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

from benchmarks.workloads.plain import adaln as plain_adaln
from meanflow_kernels import adaln, adaln_jvp
from meanflow_kernels.adaln import op as module
from meanflow_kernels.adaln.config import FORWARD
from meanflow_kernels.adaln.reference import adaln_ref, adaln_tangent_ref

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


def make(batch, length, width, stream, vectors, device, mean=0.0):
    """(x, shift, scale) and their tangents; the vectors are chunks of a (B, 6 C) projection, as a DiT passes them."""
    x, x_dot = torch.randn(2, batch, length, width, device=device)
    projection, projection_dot = torch.randn(2, batch, 6 * width, device=device).to(vectors)
    shift, scale = projection.chunk(6, -1)[1:3]
    shift_dot, scale_dot = projection_dot.chunk(6, -1)[1:3]
    return ((x + mean).to(stream), shift, scale), (x_dot.to(stream), shift_dot, scale_dot)


def case(out_dtype=None):
    """adaln with its out_dtype bound."""

    def plain(*primals):
        # what is exact is not rounded
        exact = primals[0].dtype == torch.float64
        return plain_adaln(*primals, out_dtype=None if exact else out_dtype)

    return Case(
        op=lambda *primals: adaln(*primals, out_dtype=out_dtype),
        op_jvp=lambda primals, tangents, **options: adaln_jvp(primals, tangents, out_dtype=out_dtype, **options),
        plain=plain,
        make=lambda device: make(3, 2, 24, F32, F32, device),
    )


class TestProperties(DualProperties):
    case = case()


# one row a regime: B, L, C, dtype of x, of shift and scale, of y
REGIMES = {
    "xl width, mixed as in training": (1, 3, 1152, F32, F16, F16),
    "xl width, fp32": (1, 2, 1152, F32, F32, F32),
    "large width, all fp16": (1, 2, 1024, F16, F16, F16),
    "base width": (1, 2, 768, F32, F16, F16),
    "small width": (1, 2, 384, F16, F32, F32),
    "one token": (3, 1, 64, F32, F32, F16),
    "odd width": (2, 3, 77, F16, F16, F16),
    "no alignment": (2, 3, 33, F32, F16, F32),
    "two columns": (2, 2, 2, F32, F32, F32),
    "beyond one warp": (1, 2, 1300, F32, F32, F32),
}
GPU_REGIMES = {
    f"{width} x {length}, {'stream ' + str(stream)[6:]}": (3, length, width, stream, BF16, BF16)
    for width, length in ((384, 255), (768, 64), (1024, 1024), (1152, 256), (1152, 17))
    for stream in (F32, BF16)
}


def check(batch, length, width, stream, vectors, out, device, **options):
    primals, tangents = make(batch, length, width, stream, vectors, device)
    assert_as_exact(case(out), primals, tangents, **options)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(*regime, device)


@pytest.mark.usefixtures("poisoned_empty")
def test_one_column(each_route, device):
    assert_one_column(case(), lambda: make(2, 2, 1, F32, F32, device))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", GPU_REGIMES.values(), ids=GPU_REGIMES)
def test_kernel_on_the_gpu(kernel_route, device, regime):
    check(*regime, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "rows"), [(17, 8), (8, 4)])
def test_a_program_takes_several_rows(kernel_route, device, monkeypatch, length, rows):
    config = dataclasses.replace(FORWARD, fewest_rows=rows, most_rows=rows)
    monkeypatch.setattr(module, "FORWARD", config)
    monkeypatch.setattr(module, "BACKWARD", config)
    check(1, length, 40, F32, F32, F32, device)


def test_a_large_mean_costs_no_digits(kernel_route, device):
    # rows enough that neither side is lucky in the rounding of its means
    primals, tangents = make(2, 8, 96, F32, F32, device, mean=300.0)
    assert_as_exact(case(), primals, tangents)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    # a norm of fewer columns may cancel, and both routes' rounding with it: REGIMES have those, beside plain torch
    batch, length, width = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 3), (8, 40)))
    x, x_dot = strided(data.draw(st.sampled_from(LAYOUTS)), *torch.randn(2, batch, length, width, device=device))
    vectors = torch.randn(4, batch, 2 * width, device=device)[..., 1 : width + 1]
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    tangents = tuple(a[start : start + n] for a in (x_dot, vectors[2], vectors[3]))
    reference, kernel = by_routes(lambda: adaln_jvp((x, vectors[0], vectors[1]), tangents, tangent_start=start))
    for expected, found in zip(reference, kernel, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_strided_arguments_are_read_in_place():
    primals, tangents = make(2, 3, 64, F32, F16, "cpu")
    y = torch.empty(2, 3, 64, dtype=F16)
    launch = module.forward_launch(*primals, y, *tangents, y, 0, 1e-6)
    for name, x in zip(("x", "shift", "scale"), primals, strict=True):
        assert launch.args[f"{name}_ptr"] is x
    assert launch.args["stride_shift_b"] * launch.constexprs["ALIGN"] == 6 * 64 and launch.constexprs["ALIGN"] == 16


def test_an_absent_tangent_is_no_argument():
    primals, tangents = make(2, 3, 64, F32, F16, "cpu")
    y = torch.empty(2, 3, 64, dtype=F16)
    launch = module.forward_launch(*primals, y, None, tangents[1], None, y, 0, 1e-6)
    assert launch.args["x_dot_ptr"] is None and launch.args["scale_dot_ptr"] is None
    assert launch.args["shift_dot_ptr"] is tangents[1]


def test_reference_in_fp64():
    primals, tangents = make(2, 3, 7, torch.float64, torch.float64, "cpu")
    leaves = tuple(x.clone().requires_grad_() for x in primals)
    assert torch.autograd.gradcheck(lambda *xs: adaln_ref(*xs, eps=1e-6), leaves, check_forward_ad=True)
    expected = torch.func.jvp(case().plain, primals, tangents)[1]
    assert relative_error(adaln_tangent_ref(primals, tangents, eps=1e-6), expected) < 1e-12


def test_empty(each_route, device):
    for batch, length in ((0, 3), (2, 0)):
        primals, tangents = make(batch, length, 8, F32, F32, device)
        y, y_dot = adaln_jvp(primals, tangents)
        assert y.shape == y_dot.shape == (batch, length, 8)


X, V = torch.zeros(2, 3, 8), torch.zeros(2, 8)
BAD = [
    ("x", (X[0], V, V)),
    ("x", ("text", V, V)),
    ("shift", (X, V[:1], V)),
    ("shift", (X, V[:, :7], V)),
    ("shift", (X, X, V)),
    ("scale", (X, V, V.half())),
    ("scale", (X, V, V.to("meta"))),
    ("x", (X.double(), V, V)),
    ("x", (X[..., :0], V[:, :0], V[:, :0])),
]


@pytest.mark.parametrize(("name", "primals"), BAD)
def test_wrong_arguments_raise(kernel_route, name, primals):
    for call in (lambda: adaln(*primals), lambda: adaln_jvp(primals, (None, V[:, : primals[1].shape[1]], None))):
        with pytest.raises(ValueError, match=rf"^{name}(_dot)?: got .*, wanted .*; "):
            call()
