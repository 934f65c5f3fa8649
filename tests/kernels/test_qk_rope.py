"""qk_rope: both doors against fp64, gradients and tangents that a rotation by a view of complex numbers would lose."""

import dataclasses

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact, by_routes
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from benchmarks.workloads.plain import qk_rope as plain_qk_rope
from meanflow_kernels import qk_rope, qk_rope_jvp
from meanflow_kernels.qk_rope import op as module
from meanflow_kernels.qk_rope.config import FORWARD, SUMS
from meanflow_kernels.qk_rope.reference import qk_rope_ref, qk_rope_tangent_ref

F16, F32, F64, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16


def table(length, head_dim, dtype=F32, device="cpu"):
    """cos and sin of the angles."""
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(head_dim // 2, dtype=F64) / (head_dim // 2))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def case(parameters=()):
    """qk_rope, its weights and table bound where they are given."""

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = tuple(x.to(device) for x in parameters)
    return Case(
        op=lambda qk, *others: qk_rope(qk, *(parameters or others)),
        op_jvp=lambda primals, tangents, *others, **o: qk_rope_jvp(primals, tangents, *(parameters or others), **o),
        plain=lambda qk, *others: plain_qk_rope(qk, *(parameters or others)),
        make=lambda device: tuple((x,) for x in torch.randn(2, 3, 5, 2, 2, 8, device=device)),
    )


class TestProperties(DualProperties):
    case = case((torch.linspace(0.3, 1.7, 8), torch.linspace(1.7, -0.3, 8), *table(5, 8)))


# one row a regime: B, L, H, D, dtype of qk, of the weights
REGIMES = {
    "as in training": (1, 20, 2, 64, F16, F32),
    "fp32": (2, 7, 3, 64, F32, F32),
    "all fp16": (2, 3, 2, 32, F16, F16),
    "one token": (3, 1, 2, 16, F32, F32),
    "base heads": (1, 3, 12, 64, F16, F32),
    "head dim 72": (1, 3, 3, 72, F16, F32),
    "two columns": (2, 3, 1, 2, F32, F32),
}


def inputs(batch, length, heads, head_dim, dtype, weights, device):
    """qk and its tangent, as parts of packed projections, and the parameters."""
    qk, qk_dot = torch.randn(2, batch, length, 3, heads, head_dim, device=device).to(dtype)[:, :, :, :2]
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(weights)
    return qk, qk_dot, q_weight, k_weight, *table(length, head_dim, F64 if dtype == F64 else F32, device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(each_route, device, regime):
    check(regime, device)


def check(regime, device):
    qk, qk_dot, *weights, cos, sin = inputs(*regime, device)

    def bound(function):
        return lambda *xs, **options: function(
            *xs, *(x.to(xs[-1].dtype) if xs[-1].dtype == F64 else x for x in (cos, sin)), **options
        )

    free = case()
    with_table = Case(bound(free.op), bound(free.op_jvp), bound(free.plain), free.make)
    assert_as_exact(with_table, (qk,), (qk_dot,), extra=tuple(weights))
    assert_as_exact(with_table, (qk,), (qk_dot[-1:],), extra=tuple(weights), start=len(qk) - 1)


def test_a_rotation_keeps_norms_and_turns_by_the_position():
    qk, _, *weights, cos, sin = inputs(2, 9, 2, 8, F64, F64, "cpu")
    still = torch.ones_like(cos), torch.zeros_like(sin)
    q, k = qk_rope(qk, *weights, cos, sin)
    q_still, k_still = qk_rope(qk, *weights, *still)
    for turned, x in ((q, q_still), (k, k_still)):
        pairs, before = turned.unflatten(-1, (-1, 2)), x.unflatten(-1, (-1, 2))
        assert relative_error(pairs.norm(dim=-1), before.norm(dim=-1)) < 1e-12
        assert relative_error((pairs * before).sum(-1), before.square().sum(-1) * cos[:, None]) < 1e-12
    # scores depend on the distance of positions alone
    same = qk[:1, :1].expand_as(qk)
    q, k = qk_rope(same, *weights, cos, sin)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k)
    assert relative_error(scores[..., 1:, 1:], scores[..., :-1, :-1]) < 1e-12


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(3, 276, 16, 64), (2, 276, 12, 64), (2, 17, 3, 72), (1, 5, 2, 6)], ids=str)
def test_kernel_on_the_gpu(kernel_route, device, shape):
    check((*shape, BF16, F32), device)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("length", "rows"), [(11, 4)])
def test_a_program_takes_several_rows(kernel_route, device, monkeypatch, length, rows):
    config = dataclasses.replace(FORWARD, fewest_rows=rows, most_rows=rows, stages=2)
    monkeypatch.setattr(module, "FORWARD", config)
    monkeypatch.setattr(module, "BACKWARD", config)
    # 3 programs of each sample: two rounds of sums
    monkeypatch.setattr(module, "SUMS", dataclasses.replace(SUMS, block_r=4, block_c=4))
    check((2, length, 3, 8, F32, F32), device)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_stride(device, data):
    # a norm of fewer columns may cancel, and both routes' rounding with it: REGIMES have those, beside plain torch
    batch, length, heads, pairs = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 4), (1, 6), (4, 20)))
    qk, qk_dot, *parameters = inputs(batch, length, heads, 2 * pairs, F32, F32, device)
    layout = data.draw(st.sampled_from(("packed", "dense", "heads first", "columns first", "batch expanded")))
    if layout == "dense":
        qk, qk_dot = qk.contiguous(), qk_dot.contiguous()
    elif layout == "batch expanded":
        qk, qk_dot = (x[:1].expand_as(x) for x in (qk, qk_dot))
    elif layout != "packed":
        dims = (1, 3) if layout == "heads first" else (1, 4)
        qk, qk_dot = (x.transpose(*dims).contiguous().transpose(*dims) for x in (qk, qk_dot))
    n = data.draw(st.integers(1, batch))
    start = data.draw(st.integers(0, batch - n))
    tangents = (qk_dot[start : start + n],)
    reference, kernel = by_routes(lambda: qk_rope_jvp((qk,), tangents, *parameters, tangent_start=start))
    for expected, found in zip((*reference[0], *reference[1]), (*kernel[0], *kernel[1]), strict=True):
        assert found.is_contiguous() and relative_error(found, expected) < 2e-6


def test_a_packed_projection_is_read_in_place():
    qk, qk_dot, *parameters = inputs(2, 3, 4, 64, F16, F32, "cpu")
    out = tuple(torch.empty(2, 3, 4, 64, dtype=F16) for _ in range(2))
    launch = module.forward_launch(qk, parameters, out, qk_dot, out, 0, 1e-6)
    for name, x in (("qk", qk), ("qk_dot", qk_dot)):
        assert launch.args[f"{name}_ptr"].data_ptr() == x.data_ptr()
    assert launch.args["stride_qk_l"] * launch.constexprs["ALIGN"] == 3 * 4 * 64 and launch.constexprs["ALIGN"] == 16


def test_one_result_alone_is_differentiated(each_route, device):
    qk, _, *parameters = inputs(2, 3, 2, 8, F32, F32, device)
    for used in range(2):
        leaf = qk.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(qk_rope(leaf, *parameters)[used].square().sum(), leaf)
        other = gradient[:, :, 1 - used]
        assert other.abs().max() == 0 < gradient[:, :, used].abs().min()


def test_the_kernel_takes_no_fp64(kernel_route, device):
    qk, _, *parameters = inputs(2, 3, 2, 8, F64, F64, device)
    for name, arguments in (("qk", (qk, *parameters)), ("q_weight", (qk.float(), *parameters))):
        with pytest.raises(ValueError, match=rf"^{name}: got torch.float64, wanted bfloat16, float16 or float32; "):
            qk_rope(*arguments)


def by_view(qk, q_weight, k_weight, cos, sin):
    """A rotation that reinterprets memory: bit for bit the same forward, and no derivative at all."""

    def one(x, weight):
        x = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).contiguous()
        turned = x.view(torch.complex64) * torch.complex(cos, sin)[:, None]
        return turned.view(torch.float32)

    return one(qk[:, :, 0], q_weight), one(qk[:, :, 1], k_weight)


def assert_derivatives(rope, qk, qk_dot, q_weight, k_weight, cos, sin):
    """That gradients reach q, k and both weights, and the tangent q and k, and that all are the right ones."""
    leaves = tuple(x.clone().requires_grad_() for x in (qk, q_weight, k_weight))
    out = rope(*leaves, cos, sin)
    assert all(x.requires_grad for x in out), "no gradient"
    cotangents = [torch.ones_like(x) for x in out]
    found = torch.autograd.grad(out, leaves, cotangents)
    exact = [x.double().requires_grad_() for x in (qk, q_weight, k_weight)]
    turned = qk_rope_ref(*exact, cos.double(), sin.double(), eps=1e-6)
    for x, y in zip(found, torch.autograd.grad(turned, exact, [c.double() for c in cotangents]), strict=True):
        assert y.norm() > 0 and relative_error(x, y) < 1e-5
    _, tangents = torch.func.jvp(lambda x: rope(x, q_weight, k_weight, cos, sin), (qk,), (qk_dot,))
    _, exact = torch.func.jvp(
        lambda x: qk_rope_ref(x, *(a.double() for a in (q_weight, k_weight, cos, sin)), eps=1e-6),
        (qk.double(),), (qk_dot.double(),),
    )  # fmt: skip
    for x, y in zip(tangents, exact, strict=True):
        assert y.norm() > 0 and relative_error(x, y) < 1e-5, "no tangent"


def test_gradients_and_tangents_reach_queries_and_keys(each_route, device):
    arguments = inputs(2, 5, 2, 8, F32, F32, device)
    assert_derivatives(qk_rope, *arguments)
    # the trap gives the same numbers forward, and fails
    qk, _, *parameters = arguments
    for x, y in zip(by_view(qk, *parameters), qk_rope(qk, *parameters), strict=True):
        assert relative_error(x, y) < 1e-6
    with pytest.raises(AssertionError, match="no gradient"):
        assert_derivatives(by_view, *arguments)


def test_reference_in_fp64():
    qk, qk_dot, q_weight, k_weight, cos, sin = inputs(2, 3, 2, 4, F64, F64, "cpu")
    leaves = tuple(x.clone().requires_grad_() for x in (qk, q_weight, k_weight))
    assert torch.autograd.gradcheck(lambda *xs: qk_rope_ref(*xs, cos, sin, eps=1e-6), leaves, check_forward_ad=True)
    expected = torch.func.jvp(lambda x: case().plain(x, q_weight, k_weight, cos, sin), (qk,), (qk_dot,))[1]
    found = qk_rope_tangent_ref(qk, q_weight, k_weight, cos, sin, qk_dot, eps=1e-6)
    for x, exact in zip(found, expected, strict=True):
        assert relative_error(x, exact) < 1e-12


QK, W, C = torch.zeros(2, 5, 2, 2, 8), torch.ones(8), torch.ones(5, 4)
BAD = [
    ("qk", ("text", W, W, C, C)),
    ("qk", (QK[:, :, :1], W, W, C, C)),
    ("qk", (QK[..., :7], W[:7], W[:7], C, C)),
    ("qk", (QK.long(), W, W, C, C)),
    ("q_weight", (QK, W[:4], W, C, C)),
    ("k_weight", (QK, W, W.to("meta"), C, C)),
    ("cos", (QK, W, W, C[:4], C)),
    ("sin", (QK, W, W, C, C.long())),
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(each_route, name, arguments):
    qk, *parameters = arguments
    for call in (lambda: qk_rope(*arguments), lambda: qk_rope_jvp((qk,), (QK,), *parameters)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()
