"""Gated residual + LayerNorm + modulate, on the fp32 residual stream of the training recipe and on a bf16 one."""

import pytest
import torch

from meanflow_kernels import gate_adaln, gate_adaln_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_gate_adaln(benchmark, timer, device, model, stream, variant):
    shape = size_for(device, MODELS[model])
    rows = torch.randn(4, shape.batch, shape.tokens, shape.width, device=device, dtype=stream)
    vectors = torch.randn(6, shape.batch, shape.width, device=device, dtype=stream)
    primals, tangents = (*rows[:2], *vectors[:3]), (*rows[2:], *vectors[3:])
    case = Case(gate_adaln, gate_adaln_jvp, plain.gate_adaln, primals, tangents, options={"out_dtype": torch.bfloat16})
    measure(timer, benchmark, case, naming("gate_adaln", model, shape, stream, variant), *VARIANTS[variant])
