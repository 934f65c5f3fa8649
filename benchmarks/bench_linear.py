"""The first linear of the MLP: primal rows and tangent rows through one weight."""

import pytest
import torch

from meanflow_kernels import linear, linear_jvp
from meanflow_kernels.counts import linear_flops

from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for


def _linear_jvp(primals, tangents, weight, bias, *, tangent_start=None):
    # a tangent row goes through the weight whichever sample it belongs to
    return linear_jvp(primals, tangents, weight, bias)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_linear(benchmark, timer, device, model, variant):
    shape = size_for(device, MODELS[model])
    k, c = shape.width, 4 * shape.width
    x, x_dot = (torch.randn(shape.batch, shape.tokens, k, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(c, k, device=device, dtype=torch.bfloat16) * k**-0.5
    bias = torch.randn(c, device=device, dtype=torch.bfloat16)
    rows = linear_flops(shape.batch * shape.tokens, k, c)
    # the timed backward is that of the input alone
    quarter = linear_flops(max(1, shape.batch // 4) * shape.tokens, k, c)
    flops = {"dual": 2 * rows, "quarter": rows + quarter, "primal": rows, "backward": rows}
    case = Case(linear, _linear_jvp, torch.nn.functional.linear, (x,), (x_dot,), (weight, bias), flops=flops)
    measure(timer, benchmark, case, naming("linear", model, shape, x.dtype, variant), *VARIANTS[variant])
