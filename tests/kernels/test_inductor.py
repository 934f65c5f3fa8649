"""What torch.compile is told of the operators: fallbacks, and that what calls them may be kept in its caches."""

import torch
from torch._dynamo.utils import counters
from torch._inductor import lowering
from torch._inductor.utils import fresh_cache
from torch.torch_version import TorchVersion

from meanflow.model.copies import by_copy
from meanflow_kernels import bias_gelu_jvp
from meanflow_kernels.inductor import declare_fallbacks, prepare_compiler
from meanflow_kernels.linear import chunks


def test_every_operator_has_a_fallback(monkeypatch):
    packets = vars(torch.ops.meanflow_kernels).values()
    ops = [packet.default for packet in packets if isinstance(packet, torch._ops.OpOverloadPacket)]
    names = {str(op).split(".")[1] for op in ops}
    assert {"adaln_bwd", "attention_qkv_bwd", "gate_adaln_jvp", "silu"} <= names
    for op in ops:
        # another test may have compiled it
        monkeypatch.delitem(lowering.lowerings, op, raising=False)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    declare_fallbacks()
    assert not [op for op in ops if op in lowering.lowerings]
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    declare_fallbacks()
    assert all(op in lowering.lowerings for op in ops)


def test_the_next_process_loads_what_this_one_compiled():
    """Forward and backward come from AOTAutograd's cache, with copies of weights and refused tangents in the graph."""
    torch.manual_seed(0)
    weight, bias, x, x_dot = (torch.randn(*shape) for shape in ((8, 8), (8,), (2, 4, 8), (2, 4, 8)))
    leaves = tuple(p.requires_grad_() for p in (weight, bias))
    copy = weight.detach().bfloat16()

    def loss(x, x_dot):
        h, h_dot = ((y.bfloat16() @ by_copy(weight, copy)).float() for y in (x, x_dot))
        y, y_dot = bias_gelu_jvp((h,), (h_dot,), bias)
        return sum((part - y_dot[..., :4].detach()).square().mean() for part in chunks(y, 2))

    wanted = torch.autograd.grad(loss(x, x_dot), leaves)
    prepare_compiler()
    with fresh_cache():
        for found in ("autograd_cache_miss", "autograd_cache_hit"):
            torch.compiler.reset()
            counters.clear()
            gradients = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, x_dot), leaves)
            assert counters["aot_autograd"][found] == 1 and counters["aot_autograd"]["autograd_cache_bypass"] == 0
            for g, w in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
