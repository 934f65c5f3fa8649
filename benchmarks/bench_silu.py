"""SiLU on the conditioning vectors: so small that the launch is what it costs."""

import pytest
import torch

from meanflow_kernels import silu, silu_jvp

from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_silu(benchmark, timer, device, model, variant):
    shape = size_for(device, MODELS[model])
    x, x_dot = torch.randn(2, shape.batch, shape.width, device=device, dtype=torch.bfloat16)
    case = Case(silu, silu_jvp, torch.nn.functional.silu, (x,), (x_dot,))
    measure(timer, benchmark, case, naming("silu", model, shape, x.dtype, variant), *VARIANTS[variant])
