"""qk_rope: both doors against fp64, gradients and tangents that a rotation by a view of complex numbers would lose."""

import pytest
import torch
from dual_properties import Case, DualProperties, assert_as_exact
from tolerances import relative_error

from meanflow_kernels.qk_rope import qk_rope, qk_rope_jvp
from meanflow_kernels.qk_rope.reference import qk_rope_ref, qk_rope_tangent_ref

F16, F32, F64 = torch.float16, torch.float32, torch.float64


def table(length, head_dim, dtype=F32, device="cpu"):
    """cos and sin of the angles."""
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(head_dim // 2, dtype=F64) / (head_dim // 2))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def case(parameters=()):
    """qk_rope, its weights and table bound where they are given."""

    def plain(qkv, q_weight, k_weight, cos, sin):
        def one(x, weight):
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(x.dtype)
            # as complex numbers, each after the norm
            x = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(x * torch.complex(cos, sin)[:, None]).flatten(-2).to(qkv.dtype)

        return one(qkv[:, :, 0], q_weight), one(qkv[:, :, 1], k_weight)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = tuple(x.to(device) for x in parameters)
    return Case(
        op=lambda qkv, *others: qk_rope(qkv, *(parameters or others)),
        op_jvp=lambda primals, tangents, *others, **o: qk_rope_jvp(primals, tangents, *(parameters or others), **o),
        plain=lambda qkv, *others: plain(qkv, *(parameters or others)),
        make=lambda device: tuple((x,) for x in torch.randn(2, 3, 5, 3, 2, 8, device=device)),
    )


class TestProperties(DualProperties):
    case = case((torch.linspace(0.3, 1.7, 8), torch.linspace(1.7, -0.3, 8), *table(5, 8)))


# one row a regime: B, L, H, D, dtype of qkv, of the weights
REGIMES = {
    "as in training": (1, 20, 2, 64, F16, F32),
    "fp32": (2, 7, 3, 64, F32, F32),
    "all fp16": (2, 3, 2, 32, F16, F16),
    "one token": (3, 1, 2, 16, F32, F32),
    "two columns": (2, 3, 1, 2, F32, F32),
}


def inputs(batch, length, heads, head_dim, dtype, weights, device):
    """qkv, its tangent, and the parameters."""
    qkv, qkv_dot = torch.randn(2, batch, length, 3, heads, head_dim, device=device).to(dtype)
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(weights)
    return qkv, qkv_dot, q_weight, k_weight, *table(length, head_dim, F64 if dtype == F64 else F32, device)


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_as_exact_as_plain_torch(reference_route, device, regime):
    qkv, qkv_dot, *weights, cos, sin = inputs(*regime, device)

    def bound(function):
        return lambda *xs, **options: function(
            *xs, *(x.to(xs[-1].dtype) if xs[-1].dtype == F64 else x for x in (cos, sin)), **options
        )

    free = case()
    with_table = Case(bound(free.op), bound(free.op_jvp), bound(free.plain), free.make)
    assert_as_exact(with_table, (qkv,), (qkv_dot,), extra=tuple(weights))
    assert_as_exact(with_table, (qkv,), (qkv_dot[-1:],), extra=tuple(weights), start=len(qkv) - 1)


def test_a_rotation_keeps_norms_and_turns_by_the_position():
    qkv, _, *weights, cos, sin = inputs(2, 9, 2, 8, F64, F64, "cpu")
    still = torch.ones_like(cos), torch.zeros_like(sin)
    q, k = qk_rope(qkv, *weights, cos, sin)
    q_still, k_still = qk_rope(qkv, *weights, *still)
    for turned, x in ((q, q_still), (k, k_still)):
        pairs, before = turned.unflatten(-1, (-1, 2)), x.unflatten(-1, (-1, 2))
        assert relative_error(pairs.norm(dim=-1), before.norm(dim=-1)) < 1e-12
        assert relative_error((pairs * before).sum(-1), before.square().sum(-1) * cos[:, None]) < 1e-12
    # scores depend on the distance of positions alone
    same = qkv[:1, :1].expand_as(qkv)
    q, k = qk_rope(same, *weights, cos, sin)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k)
    assert relative_error(scores[..., 1:, 1:], scores[..., :-1, :-1]) < 1e-12


def test_the_values_are_neither_read_nor_given_a_gradient(each_route, device):
    qkv, qkv_dot, *parameters = inputs(2, 3, 2, 8, F32, F32, device)
    expected = qk_rope_jvp((qkv,), (qkv_dot,), *parameters)
    qkv, qkv_dot = qkv.clone(), qkv_dot.clone()
    qkv[:, :, 2] = qkv_dot[:, :, 2] = float("nan")
    leaf = qkv.requires_grad_()
    found = qk_rope_jvp((leaf,), (qkv_dot,), *parameters)
    for x, y in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in found[0]), leaf)
    assert gradient[:, :, 2].abs().max() == 0 < gradient[:, :, :2].abs().min()


def by_view(qkv, q_weight, k_weight, cos, sin):
    """A rotation that reinterprets memory: bit for bit the same forward, and no derivative at all."""

    def one(x, weight):
        x = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).contiguous()
        turned = x.view(torch.complex64) * torch.complex(cos, sin)[:, None]
        return turned.view(torch.float32)

    return one(qkv[:, :, 0], q_weight), one(qkv[:, :, 1], k_weight)


def assert_derivatives(rope, qkv, qkv_dot, q_weight, k_weight, cos, sin):
    """That gradients reach q, k and both weights, and the tangent q and k, and that all are the right ones."""
    leaves = tuple(x.clone().requires_grad_() for x in (qkv, q_weight, k_weight))
    out = rope(*leaves, cos, sin)
    assert all(x.requires_grad for x in out), "no gradient"
    cotangents = [torch.ones_like(x) for x in out]
    found = torch.autograd.grad(out, leaves, cotangents)
    exact = [x.double().requires_grad_() for x in (qkv, q_weight, k_weight)]
    turned = qk_rope_ref(*exact, cos.double(), sin.double(), eps=1e-6)
    for x, y in zip(found, torch.autograd.grad(turned, exact, [c.double() for c in cotangents]), strict=True):
        assert y.norm() > 0 and relative_error(x, y) < 1e-5
    _, tangents = torch.func.jvp(lambda x: rope(x, q_weight, k_weight, cos, sin), (qkv,), (qkv_dot,))
    _, exact = torch.func.jvp(
        lambda x: qk_rope_ref(x, *(a.double() for a in (q_weight, k_weight, cos, sin)), eps=1e-6),
        (qkv.double(),), (qkv_dot.double(),),
    )  # fmt: skip
    for x, y in zip(tangents, exact, strict=True):
        assert y.norm() > 0 and relative_error(x, y) < 1e-5, "no tangent"


def test_gradients_and_tangents_reach_queries_and_keys(each_route):
    arguments = inputs(2, 5, 2, 8, F32, F32, "cpu")
    assert_derivatives(qk_rope, *arguments)
    # the trap gives the same numbers forward, and fails
    qkv, _, *parameters = arguments
    for x, y in zip(by_view(qkv, *parameters), qk_rope(qkv, *parameters), strict=True):
        assert relative_error(x, y) < 1e-6
    with pytest.raises(AssertionError, match="no gradient"):
        assert_derivatives(by_view, *arguments)


def test_reference_in_fp64():
    qkv, qkv_dot, q_weight, k_weight, cos, sin = inputs(2, 3, 2, 4, F64, F64, "cpu")
    leaves = tuple(x.clone().requires_grad_() for x in (qkv, q_weight, k_weight))
    assert torch.autograd.gradcheck(lambda *xs: qk_rope_ref(*xs, cos, sin, eps=1e-6), leaves, check_forward_ad=True)
    expected = torch.func.jvp(lambda x: case().plain(x, q_weight, k_weight, cos, sin), (qkv,), (qkv_dot,))[1]
    found = qk_rope_tangent_ref(qkv, q_weight, k_weight, cos, sin, qkv_dot, eps=1e-6)
    for x, exact in zip(found, expected, strict=True):
        assert relative_error(x, exact) < 1e-12


QKV, W, C = torch.zeros(2, 5, 3, 2, 8), torch.ones(8), torch.ones(5, 4)
BAD = [
    ("qkv", ("text", W, W, C, C)),
    ("qkv", (QKV[:, :, :2], W, W, C, C)),
    ("qkv", (QKV[..., :7], W[:7], W[:7], C, C)),
    ("qkv", (QKV.long(), W, W, C, C)),
    ("q_weight", (QKV, W[:4], W, C, C)),
    ("k_weight", (QKV, W, W.to("meta"), C, C)),
    ("cos", (QKV, W, W, C[:4], C)),
    ("sin", (QKV, W, W, C, C.long())),
]


@pytest.mark.parametrize(("name", "arguments"), BAD)
def test_wrong_arguments_raise(each_route, name, arguments):
    qkv, *parameters = arguments
    for call in (lambda: qk_rope(*arguments), lambda: qk_rope_jvp((qkv,), (QKV,), *parameters)):
        with pytest.raises(ValueError, match=rf"^{name}: got .*, wanted .*; "):
            call()
