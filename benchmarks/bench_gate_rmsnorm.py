"""Gated residual + RMSNorm, on the fp32 residual stream and bf16 branches of the training recipe."""

import pytest
import torch

from meanflow_kernels import gate_rmsnorm, gate_rmsnorm_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import IMF, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", IMF)
def test_gate_rmsnorm(benchmark, timer, device, model, variant):
    shape = size_for(device, IMF[model])
    x, x_dot, y, y_dot = torch.randn(4, shape.batch, shape.tokens, shape.width, device=device)
    primals, tangents = (x, y.bfloat16()), (x_dot, y_dot.bfloat16())
    parameters, options = tuple(torch.randn(2, shape.width, device=device)), {"out_dtype": torch.bfloat16}
    case = Case(gate_rmsnorm, gate_rmsnorm_jvp, plain.gate_rmsnorm, primals, tangents, parameters, options)
    measure(timer, benchmark, case, naming("gate_rmsnorm", model, shape, x.dtype, variant), *VARIANTS[variant])
