"""SwiGLU on the hidden layer of improved MeanFlow's MLP, whose width is stored padded."""

import pytest
import torch

from meanflow.model.imf import padded
from meanflow_kernels import swiglu, swiglu_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import IMF, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", IMF)
def test_swiglu(benchmark, timer, device, model, variant):
    shape = size_for(device, IMF[model])
    hidden = padded(shape.width * 8 // 3)
    x, x_dot = torch.randn(2, shape.batch, shape.tokens, 2 * hidden, device=device, dtype=torch.bfloat16)
    case = Case(swiglu, swiglu_jvp, plain.swiglu, (x,), (x_dot,))
    measure(timer, benchmark, case, naming("swiglu", model, shape, x.dtype, variant), *VARIANTS[variant])
