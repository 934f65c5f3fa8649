"""QK-norm and rotary embedding of the queries and keys of a packed projection."""

import pytest
import torch

from meanflow.model.imf import rope_table
from meanflow_kernels import qk_rope, qk_rope_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import IMF, naming, size_for


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", IMF)
def test_qk_rope(benchmark, timer, device, model, variant):
    shape = size_for(device, IMF[model])
    size = (2, shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    qk, qk_dot = torch.randn(size, device=device, dtype=torch.bfloat16)[:, :, :, :2]
    weights = torch.randn(2, shape.head_dim, device=device)
    table = rope_table(shape.tokens, shape.head_dim, dtype=torch.float32, device=torch.device(device))
    case = Case(qk_rope, qk_rope_jvp, plain.qk_rope, (qk,), (qk_dot,), (*weights, *table))
    measure(timer, benchmark, case, naming("qk_rope", model, shape, qk.dtype, variant), *VARIANTS[variant])
