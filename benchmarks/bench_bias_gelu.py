"""Bias + tanh-GELU on the hidden layer of the MLP, four times the model's width."""

import pytest
import torch

from meanflow_kernels import bias_gelu, bias_gelu_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_bias_gelu(benchmark, timer, device, model, variant):
    shape = size_for(device, MODELS[model])
    x, x_dot = torch.randn(2, shape.batch, shape.tokens, 4 * shape.width, device=device, dtype=torch.bfloat16)
    bias = torch.randn(4 * shape.width, device=device, dtype=torch.bfloat16)
    case = Case(bias_gelu, bias_gelu_jvp, plain.bias_gelu, (x,), (x_dot,), (bias,))
    measure(timer, benchmark, case, naming("bias_gelu", model, shape, x.dtype, variant), *VARIANTS[variant])
