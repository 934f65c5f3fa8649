"""FLOPs and bytes: what torch's counter finds on each operator equals the formulas, on real, fake and meta tensors."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import meanflow_kernels
from meanflow_kernels import (
    adaln_jvp,
    attention,
    attention_jvp,
    bias_gelu_jvp,
    gate_adaln_jvp,
    gate_rmsnorm_jvp,
    linear,
    linear_jvp,
    qk_rope_jvp,
    rmsnorm_jvp,
    silu_jvp,
    swiglu_jvp,
    timestep_embedding_jvp,
)
from meanflow_kernels.counts import (
    attention_bwd_flops,
    attention_flops,
    attention_tangent_flops,
    linear_flops,
    moved_bytes,
)
from meanflow_kernels.routing import Route, force_route

# batch, queries, keys, heads, head width
B, M, N, H, D = 4, 32, 48, 2, 24


@pytest.fixture(params=["real", "fake", "meta"])
def place(request):
    """The device of the test's tensors, with the kernel route forced: nothing but real tensors runs a kernel."""
    with force_route(Route.TRITON):
        if request.param == "fake":
            with FakeTensorMode():
                yield "cpu"
        else:
            yield "meta" if request.param == "meta" else ("cuda" if torch.cuda.is_available() else "cpu")


def _qkv(device: str, batch: int = B, **options):
    return tuple(torch.randn(batch, length, H, D, device=device, **options) for length in (M, N, N))


def _count(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_attention(place):
    q, k, v = _qkv(place)
    assert _count(lambda: attention(q, k, v)) == attention_flops(B, H, M, N, D) == 4 * B * H * M * N * D


def test_attention_with_its_tangent_is_six_products(place):
    primals, tangents = _qkv(place), _qkv(place)
    assert _count(lambda: attention_jvp(primals, tangents)) == 12 * B * H * M * N * D


def test_slice_counts_only_its_own_tangent(place):
    primals, tangents = _qkv(place), _qkv(place, batch=1)
    counted = _count(lambda: attention_jvp(primals, tangents, tangent_start=B - 1))
    assert counted == attention_flops(B, H, M, N, D) + attention_tangent_flops(1, H, M, N, D)
    assert counted == (4 * B + 8) * H * M * N * D


@pytest.mark.parametrize(
    ("present", "products"),
    [((1, 0, 0), 2), ((0, 1, 0), 2), ((0, 0, 1), 1), ((1, 1, 0), 3), ((1, 0, 1), 3), ((1, 1, 1), 4)],
)
def test_absent_tangents_count_nothing(place, present, products):
    tangents = tuple(x if there else None for x, there in zip(_qkv(place), present, strict=True))
    primals = _qkv(place)
    assert _count(lambda: attention_jvp(primals, tangents)) == (4 + 2 * products) * B * H * M * N * D


@pytest.mark.parametrize("dual", [False, True])
def test_attention_backward_is_two_and_a_half_forwards(place, dual):
    primals = _qkv(place, requires_grad=True)

    def step():
        o = attention_jvp(primals, tuple(x.detach() for x in primals))[0] if dual else attention(*primals)
        o.sum().backward()

    forward = 12 if dual else 4
    assert _count(step) == forward * B * H * M * N * D + attention_bwd_flops(B, H, M, N, D)
    assert attention_bwd_flops(B, H, M, N, D) == 2.5 * attention_flops(B, H, M, N, D)


def test_linear(place):
    x, x_dot = torch.randn(6, 8, 16, device=place, requires_grad=True), torch.randn(2, 8, 16, device=place)
    weight, bias = torch.randn(32, 16, device=place, requires_grad=True), torch.randn(32, device=place)
    assert _count(lambda: linear(x, weight, bias)) == linear_flops(48, 16, 32)
    assert _count(lambda: linear_jvp((x,), (x_dot,), weight, bias)) == linear_flops(48 + 16, 16, 32)

    def step():
        linear_jvp((x,), (x_dot,), weight, bias)[0].sum().backward()

    # the tangent's rows have no backward
    assert _count(step) == linear_flops(48 + 16, 16, 32) + 2 * linear_flops(48, 16, 32)


def test_pointwise_operators_count_no_products(place):
    x, x_dot = torch.randn(2, 2, 16, 64, device=place).unbind()
    vectors = torch.randn(6, 2, 64, device=place)
    t = torch.rand(2, device=place)

    def run():
        adaln_jvp((x, *vectors[:2]), (x_dot, *vectors[2:4]))
        gate_adaln_jvp((x, x, *vectors[:3]), (x_dot, x_dot, *vectors[3:]))
        gate_rmsnorm_jvp((x, x), (x_dot, x_dot), vectors[0][0], vectors[0][0])
        bias_gelu_jvp((x,), (x_dot,), vectors[0][0])
        qk = x.view(2, 16, 2, 2, 16)
        qk_rope_jvp((qk,), (qk,), *vectors[:2, 0, :16], *vectors[:2, :1, :8].expand(2, 16, 8))
        rmsnorm_jvp((x,), (x_dot,), vectors[0][0])
        silu_jvp((x,), (x_dot,))
        swiglu_jvp((x,), (x_dot,))
        timestep_embedding_jvp((t,), (t,), 64)

    assert _count(run) == 0


def test_every_registered_operator_has_a_formula():
    # an operator without one would be left out of a profile without a word
    sources = "".join(path.read_text() for path in Path(meanflow_kernels.__file__).parent.glob("*/op.py"))
    ours = set(re.findall(r'(?:custom|kernel)_op\("(meanflow_kernels::\w+)"', sources))
    assert ours and ours == {str(op).replace(".", "::") for op in flop_registry if "meanflow_kernels" in str(op)}


def test_bytes_count_a_view_by_its_elements():
    packed = torch.empty(2, 8, 3, 4, 16, dtype=torch.bfloat16)
    q, k, v = packed.unbind(2)
    o, lse = torch.empty(2, 8, 4, 16, dtype=torch.bfloat16), torch.empty(2, 4, 8)
    assert moved_bytes([q, k, v, None, 1.0], [o, lse]) == 4 * (2 * 8 * 4 * 16) * 2 + 2 * 4 * 8 * 4
