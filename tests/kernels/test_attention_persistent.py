"""The persistent kernel of sm_90 against fp64, and which calls go to it. Gluon has no interpreter: it runs on a GPU."""

import importlib
import sys

import pytest
import torch
from attention_inputs import HARD, exact_jvp, make_inputs, plain_attention
from tolerances import assert_error, relative_error

from meanflow_kernels import attention_jvp
from meanflow_kernels.attention import config
from meanflow_kernels.attention.config import PERSISTENT, AttentionConfig, PersistentConfig, dual_config
from meanflow_kernels.attention.launches import forward_launch
from meanflow_kernels.launch import arch_of
from meanflow_kernels.routing import overriding

BF16 = torch.bfloat16
ops = torch.ops.meanflow_kernels


def forced(choice):
    """A scope in which every call that ``choice`` serves goes to it."""
    return overriding(config, DUAL_90=((72, 0, choice), *config.DUAL_90))


@pytest.fixture
def persistent():
    """Every call that the persistent kernel serves goes to it."""
    with forced(PERSISTENT):
        yield


@pytest.fixture
def hopper(persistent, poisoned_empty):
    """``persistent`` on a GPU that has it; what is not written is NaN."""
    arch = arch_of(torch.device("cuda"))
    if arch != 90:
        pytest.skip(f"the persistent kernel is of sm_90, this is sm_{arch}")
    assert dual_config(arch, BF16, 64, 1) == dual_config(arch, BF16, 72, 1) == PERSISTENT


#           why                                  B   M     N    H
REGIMES = {
    "XL/2's step: fewer than two items each": (8, 256, 256, 16),
    "one sample of one head": (1, 256, 256, 1),
    "one item, one step": (1, 128, 64, 1),
    "one sample": (1, 256, 256, 16),
    "fewer steps than stages": (2, 128, 128, 3),
    "items that do not divide by the programs": (9, 256, 256, 15),
    "many items": (32, 256, 256, 16),
    "one past a tile": (3, 129, 65, 2),
    "one short of a tile": (3, 255, 255, 2),
    "one group without rows": (2, 17, 320, 3),
    "short keys": (2, 300, 17, 2),
    "registers beside the tokens": (2, 276, 276, 16),
    "long": (1, 1024, 1024, 2),
}


def _check(primals, tangents):
    q, k = (x.double() for x in primals[:2])
    o, lse, o_dot = ops.attention_jvp(*primals, *tangents, q.shape[-1] ** -0.5, 0)
    exact, plain = exact_jvp(primals, tangents), torch.func.jvp(plain_attention, primals, tangents)
    assert o.is_contiguous() and o_dot.is_contiguous()
    assert_error(o, exact[0], plain[0], "o")
    assert_error(o_dot, exact[1], plain[1], "o_dot")
    # the scores are of products that are exact in fp32, and their sum is in fp32
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    assert lse.dtype == torch.float32 and (lse.double() - s.logsumexp(-1)).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES.keys())
def test_error_is_at_most_twice_plain_torch(shape, head_dim, hopper):
    _check(*make_inputs("iid", *shape, head_dim, BF16, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
@pytest.mark.parametrize("kind", HARD)
def test_error_on_hard_inputs(kind, head_dim, hopper):
    _check(*make_inputs(kind, 2, 256, 256, 3, head_dim, BF16, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("stages", (2, 3))
@pytest.mark.parametrize("head_dim", (64, 72))
def test_every_input_is_read_by_its_own_strides(head_dim, stages, hopper):
    b, length, h = 3, 200, 2
    packed = torch.randn(b, length, 3, h, head_dim, device="cuda", dtype=BF16)
    heads_first = torch.randn(b, h, length, head_dim, device="cuda", dtype=BF16).transpose(1, 2)
    whole = torch.randn(b, length, h, head_dim, device="cuda", dtype=BF16)
    padded = torch.randn(b, length, h, head_dim + 8, device="cuda", dtype=BF16)[..., :head_dim]
    primals, tangents = (packed[:, :, 1], heads_first, whole), (padded, packed[:, :, 0], heads_first.flip(0))
    with forced(PersistentConfig(stages)):
        _check(primals, tangents)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
def test_a_slice_of_the_batch_carries_the_tangent(head_dim, hopper):
    primals, tangents = make_inputs("iid", 4, 256, 256, 2, head_dim, BF16, "cuda")
    o, o_dot = attention_jvp(primals, tuple(x[2:3] for x in tangents), tangent_start=2)
    whole, whole_dot = attention_jvp(primals, tangents)
    assert torch.equal(o[2:3], whole[2:3]) and torch.equal(o_dot, whole_dot[2:3])
    # the other samples by another kernel: the same sums, in another order
    assert relative_error(o, whole) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
def test_tangent_hardly_depends_on_a_shift_of_v(head_dim, hopper):
    # as in test_attention.py; here in bf16: 1.5e-3 to 2.3e-3 where the very products are summed, else 7e-3
    (q, k, v), tangents = make_inputs("iid", 1, 64, 64, 2, head_dim, BF16, "cuda")
    tangents = (*tangents[:2], torch.zeros_like(v))
    v = (v.clamp(-3, 3) * 8).round() / 8
    shifted = v + 4
    assert torch.equal(shifted - 4, v)
    o_dot, o_dot_shifted = (attention_jvp((q, k, x), tangents)[1] for x in (v, shifted))
    assert relative_error(o_dot_shifted, o_dot) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 72))
def test_captured_and_compiled_it_gives_the_same(head_dim, hopper):
    primals, tangents = make_inputs("iid", 2, 256, 256, 3, head_dim, BF16, "cuda")
    eager = attention_jvp(primals, tangents)
    compiled = torch.compile(lambda *x: attention_jvp(x[:3], x[3:]), fullgraph=True)(*primals, *tangents)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_jvp(primals, tangents)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for found in (compiled, captured):
        assert all(torch.equal(x, y) for x, y in zip(found, eager, strict=True))


def test_what_it_does_not_serve_goes_to_triton(persistent, monkeypatch):
    monkeypatch.setattr(config, "_has_gluon", lambda: True)
    assert dual_config(90, BF16, 64, 256) == dual_config(90, BF16, 72, 17) == PERSISTENT
    for call in (80, BF16, 64), (100, BF16, 64), (90, torch.float16, 64), (90, torch.float32, 72), (90, BF16, 56):
        assert isinstance(dual_config(*call, 256), AttentionConfig), call
    assert isinstance(dual_config(90, BF16, 64, 256, every=False), AttentionConfig)
    monkeypatch.setattr(config, "_has_gluon", lambda: False)
    assert isinstance(dual_config(90, BF16, 64, 256), AttentionConfig)


def test_a_triton_without_this_gluon_is_no_error(monkeypatch):
    triton = pytest.importorskip("triton", reason="Gluon is a part of Triton")
    importlib.import_module("meanflow_kernels.attention.persistent_kernel")
    # as on a GPU: the tests' interpreter has no Gluon either
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    found = config._has_gluon.__wrapped__
    assert found()
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    monkeypatch.delitem(sys.modules, "meanflow_kernels.attention.persistent_kernel")
    assert not found()


@pytest.mark.parametrize(("batch", "m", "items"), [(0, 256, 0), (1, 128, 2), (2, 129, 8), (100, 256, 400)])
def test_a_program_on_each_multiprocessor_and_none_without_an_item(batch, m, items):
    q = torch.empty(batch, m, 2, 64, dtype=BF16, device="meta")
    lse = q.new_empty((batch, 2, m), dtype=torch.float32)
    launch = forward_launch((q, q, q), (q, q, q), (q, q, lse), 1.0, PERSISTENT)
    # meta tensors are taken for an H100's or H200's: 132 multiprocessors
    assert launch.args["items"] == items and launch.grid == (min(items, 132),)
