"""RMSNorm of the fp32 residual stream for products in bf16."""

import pytest
import torch

from meanflow_kernels import rmsnorm, rmsnorm_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import IMF, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", IMF)
def test_rmsnorm(benchmark, timer, device, model, variant):
    shape = size_for(device, IMF[model])
    x, x_dot = torch.randn(2, shape.batch, shape.tokens, shape.width, device=device)
    weight, options = torch.randn(shape.width, device=device), {"out_dtype": torch.bfloat16}
    case = Case(rmsnorm, rmsnorm_jvp, plain.rmsnorm, (x,), (x_dot,), (weight,), options)
    measure(timer, benchmark, case, naming("rmsnorm", model, shape, x.dtype, variant), *VARIANTS[variant])
