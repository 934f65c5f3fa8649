"""The operators are known to Inductor before it meets them, where meeting them would cost the text of all before."""

import torch
from torch._inductor import lowering
from torch.torch_version import TorchVersion

import meanflow_kernels  # noqa: F401
from meanflow_kernels.inductor import declare_fallbacks


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
