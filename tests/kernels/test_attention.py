"""The attention kernels against fp64: forward, tangent and lse, on every regime of shapes and on the hard inputs."""

import pytest
import torch
from attention_inputs import HARD, exact_jvp, make_inputs, plain_jvps
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tolerances import assert_error, relative_error

from meanflow_kernels import attention, attention_jvp
from meanflow_kernels.attention.config import AttentionConfig
from meanflow_kernels.attention.launches import aligned, forward_launch
from meanflow_kernels.routing import Route, force_route

pytestmark = pytest.mark.usefixtures("kernel_route", "poisoned_empty")

FP32, FP16 = torch.float32, torch.float16
#           why                                   B  M     N     H  D    dtype
REGIMES = {
    "one query": (8, 1, 255, 1, 72, FP32),
    "shorter than a tile": (2, 17, 17, 2, 32, FP16),
    "one tile": (1, 64, 64, 2, 64, FP16),
    "one past a tile, ieee": (1, 17, 64, 1, 96, FP32),
    "one short of the tiles": (1, 255, 255, 1, 64, FP16),
    "imagenet, B/2": (1, 256, 256, 1, 64, FP16),
    "imagenet, XL/2": (1, 256, 256, 1, 72, FP16),
    "imagenet, ieee": (1, 64, 256, 1, 72, FP32),
    "short queries, split head dim": (1, 17, 255, 1, 96, FP16),
    "short keys, widest head dim": (1, 255, 17, 1, 128, FP16),
    "widest head dim, ieee": (1, 17, 64, 1, 128, FP32),
    "long keys": (1, 64, 1024, 1, 72, FP16),
    "long queries": (1, 1024, 64, 1, 64, FP16),
}


def _check(primals, tangents):
    o, o_dot = attention_jvp(primals, tangents)
    o_alone = attention(*primals)
    # torch.func.jvp does not take expanded tensors
    primals, tangents = (tuple(x.contiguous() for x in xs) for xs in (primals, tangents))
    (o_exact, o_dot_exact), (o_plain, o_dot_plain) = exact_jvp(primals, tangents), plain_jvps(primals, tangents)
    assert o.is_contiguous() and o_dot.is_contiguous()
    assert_error(o, o_exact, o_plain, "o")
    assert_error(o_dot, o_dot_exact, o_dot_plain, "o_dot")
    assert_error(o_alone, o_exact, o_plain, "o of the plain op")


@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES.keys())
def test_error_is_at_most_twice_plain_torch(shape, device):
    _check(*make_inputs("iid", *shape, device))


@pytest.mark.parametrize("queries", (1, 17))
def test_one_key(queries, device):
    """With one key p = 1, so that o = v and o_dot = v_dot, and plain torch is exact: its p_dot is p (s_dot - s_dot).

    The kernel adds v_dot and s_dot v, and takes o l_dot = v s_dot away again. s_dot is one number in both, whatever its
    own rounding, so that o_dot is off by the rounding of the sum, of the product and of the difference: 2^-24 of each.
    """
    (q, k, v), tangents = make_inputs("iid", 2, queries, 1, 2, 64, FP32, device)
    q_dot, k_dot, v_dot = tangents
    o, o_dot = attention_jvp((q, k, v), tangents)
    assert torch.equal(o, v.expand_as(o)) and torch.equal(attention(q, k, v), o)
    shift = (q_dot * k + q * k_dot).sum(-1, keepdim=True) * 64**-0.5 * v
    assert ((o_dot - v_dot).abs() <= 2**-24 * ((v_dot + shift).abs() + shift.abs() + v_dot.abs())).all()


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("length", "head_dim", "dtype"), [(64, 72, FP32), (255, 64, FP16)], ids=["ieee", "fp16"])
def test_error_on_hard_inputs(kind, length, head_dim, dtype, device):
    _check(*make_inputs(kind, 1, length, length, 1, head_dim, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ("iid", *HARD))
@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES.keys())
def test_error_in_bf16(shape, kind):
    _check(*make_inputs(kind, *shape[:5], torch.bfloat16, "cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (FP32, FP16), ids=("ieee", "fp16"))
@pytest.mark.parametrize("head_dim", (32, 64, 72, 96, 128))
@pytest.mark.parametrize("length", (255, 256, 1024))
def test_error_over_lengths_and_head_dims(length, head_dim, dtype, device):
    _check(*make_inputs("iid", 1, min(length, 256), length, 1, head_dim, dtype, device))


# measured for this arithmetic: 2.8e-4 to 2.9e-4 on iid inputs, where the store to fp16 alone costs 2.1e-4
FP16_BARS = {"iid": 3.2e-4} | dict.fromkeys(HARD, 4.5e-4)
BF16_BARS = {"iid": 2.5e-3} | dict.fromkeys(HARD, 3.5e-3)


def _tangent_error(kind, dtype, device):
    primals, tangents = make_inputs(kind, 1, 256, 256, 2, 72, dtype, device)
    return relative_error(attention_jvp(primals, tangents)[1], exact_jvp(primals, tangents)[1])


@pytest.mark.parametrize("kind", FP16_BARS)
def test_tangent_error_in_fp16(kind, device):
    assert _tangent_error(kind, FP16, device) <= FP16_BARS[kind]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", BF16_BARS)
def test_tangent_error_in_bf16(kind):
    assert _tangent_error(kind, torch.bfloat16, "cuda") <= BF16_BARS[kind]


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP32), (72, FP16)], ids=["summed", "from the column of ones"])
def test_lse_is_the_natural_logarithm(head_dim, dtype, device):
    (q, k, v), _ = make_inputs("sharp", 2, 17, 33, 2, head_dim, dtype, device)
    _, lse = torch.ops.meanflow_kernels.attention(q, k, v, head_dim**-0.5)
    plain, exact = (
        (torch.einsum("bmhd,bnhd->bhmn", q.to(dt), k.to(dt)) * head_dim**-0.5).logsumexp(-1)
        for dt in (FP32, torch.float64)
    )
    if dtype == FP32:
        # scores reach 38, from sums of 64 products that reach 310 on their way: each of the 64 is rounded by up to
        # 1.5e-5, so that a score is off by about 1e-5, in whatever order the machine adds. So is plain torch's, whose
        # error of all rows together is the bar
        assert_error(lse, exact, plain, "lse")
    else:
        # the row sum is of p rounded to fp16, by 2^-11 at most, and so is lse off
        assert lse.dtype == FP32 and (lse.double() - exact).abs().max() < 1e-3


def _layout(name, batch, length, heads, head_dim, device):
    """A (B, L, H, D) fp32 view with the strides of ``name``."""
    if name == "packed":
        return torch.randn(batch, length, 3, heads, head_dim, device=device)[:, :, 1]
    if name == "heads first":
        return torch.randn(batch, heads, length, head_dim, device=device).transpose(1, 2)
    if name == "off the 16-byte grid":
        return torch.randn(batch * length * heads * head_dim + 1, device=device)[1:].view(
            batch, length, heads, head_dim
        )
    if name == "odd row stride":
        return torch.randn(batch, length, heads, head_dim + 1, device=device)[..., :-1]
    if name == "columns apart":
        return torch.randn(batch, length, heads, head_dim, 2, device=device)[..., 0]
    if name == "one head for all":
        return torch.randn(batch, length, 1, head_dim, device=device).expand(-1, -1, heads, -1)
    return torch.randn(batch, length, heads, head_dim, device=device)


IN_PLACE = ("contiguous", "packed", "heads first", "one head for all")
COPIED = ("off the 16-byte grid", "odd row stride", "columns apart")
layouts = st.sampled_from(IN_PLACE + COPIED)


@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    batch=st.integers(1, 2),
    m=st.integers(1, 40),
    n=st.integers(2, 40),
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 16).map(lambda eighth: 8 * eighth),
    names=st.tuples(*[layouts] * 6),
)
def test_any_shapes_and_strides(batch, m, n, heads, head_dim, names):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = (m, n, n, m, n, n)
    inputs = [
        _layout(name, batch, length, heads, head_dim, device) for name, length in zip(names, lengths, strict=True)
    ]
    with force_route(Route.TRITON):
        _check(tuple(inputs[:3]), tuple(inputs[3:]))


@pytest.mark.parametrize("name", IN_PLACE + COPIED)
def test_only_what_wide_loads_cannot_reach_is_copied(name, device):
    x = _layout(name, 2, 5, 3, 24, device)
    y = aligned(x)
    assert torch.equal(x, y)
    assert (y is x) == (name in IN_PLACE)


def test_scale(device):
    (q, k, v), tangents = make_inputs("iid", 1, 17, 17, 1, 32, FP32, device)
    o, o_dot = attention_jvp((q, k, v), tangents, scale=0.5)
    # attention with twice the queries at half the scale is the same function
    o_same, o_dot_same = attention_jvp((2 * q, k, v), (2 * tangents[0], *tangents[1:]), scale=0.25)
    assert relative_error(o_same, o) < 1e-6 and relative_error(o_dot_same, o_dot) < 1e-6
    assert relative_error(o, attention(q, k, v)) > 1e-2


PATHS = {
    "rounded by pairs": AttentionConfig(32, 16, 4, 2, packed=True),
    "separate": AttentionConfig(32, 16, 4, 2, separate=True),
    "summed": AttentionConfig(32, 16, 4, 2, ones=False),
    "separate, summed": AttentionConfig(32, 16, 4, 2, ones=False, packed=True, separate=True),
}


def _forward(primals, tangents, config):
    q = primals[0]
    o, o_dot = (q.new_empty(q.shape) for _ in range(2))
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=FP32)
    forward_launch(primals, tangents, (o, o_dot, lse), q.shape[-1] ** -0.5, config).run()
    return o, o_dot


@pytest.mark.parametrize("present", [(True, True, True), (True, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, FP16), (72, FP16), (72, FP32)], ids=["64", "72", "ieee"])
@pytest.mark.parametrize("config", PATHS.values(), ids=PATHS.keys())
def test_every_code_path(config, head_dim, dtype, present, device):
    primals, tangents = make_inputs("shifted v", 1, 33, 47, 2, head_dim, dtype, device)
    some = tuple(x if p else None for x, p in zip(tangents, present, strict=True))
    zeros = tuple(x if p else torch.zeros_like(x) for x, p in zip(tangents, present, strict=True))
    o, o_dot = _forward(primals, some, config)
    exact, plain = exact_jvp(primals, zeros), plain_jvps(primals, zeros)
    assert_error(o, exact[0], plain[0], "o")
    assert_error(o_dot, exact[1], plain[1], "o_dot")


@pytest.mark.parametrize(
    ("config", "head_dim", "bar"),
    [
        (AttentionConfig(64, 64, 4, 2), 64, 4e-4),
        (AttentionConfig(64, 64, 4, 2), 72, 5e-5),
        (PATHS["summed"], 72, 4e-4),
        (PATHS["separate, summed"], 72, 4e-4),
    ],
    ids=("summed", "from the column of ones", "summed beside a free column", "separate"),
)
def test_tangent_hardly_depends_on_a_shift_of_v(config, head_dim, bar, device):
    # sum_n p_dot = 0, so a shift of v cancels where l_dot sums the very products that multiply v. It cancels entirely
    # with l from the same column of ones; summed in fp32 before rounding, l leaves the rounding of p times l_dot
    (q, k, v), tangents = make_inputs("iid", 1, 64, 64, 1, head_dim, FP16, device)
    tangents = (*tangents[:2], torch.zeros_like(v))
    v = (v * 8).round() / 8
    shifted = v + 4
    assert torch.equal(shifted - 4, v)
    o_dot, o_dot_shifted = (_forward((q, k, x), tangents, config)[1] for x in (v, shifted))
    assert relative_error(o_dot_shifted, o_dot) < bar
