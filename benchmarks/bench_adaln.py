"""LayerNorm + modulate, on the fp32 residual stream of the training recipe and on a bf16 one."""

import pytest
import torch

from meanflow_kernels import adaln, adaln_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_adaln(benchmark, timer, device, model, stream, variant):
    shape = size_for(device, MODELS[model])
    x, x_dot = torch.randn(2, shape.batch, shape.tokens, shape.width, device=device, dtype=stream)
    vectors = torch.randn(4, shape.batch, shape.width, device=device, dtype=stream)
    options = {"out_dtype": torch.bfloat16}
    case = Case(adaln, adaln_jvp, plain.adaln, (x, *vectors[:2]), (x_dot, *vectors[2:]), options=options)
    measure(timer, benchmark, case, naming("adaln", model, shape, stream, variant), *VARIANTS[variant])
