"""LayerNorm + modulate, on the fp32 residual stream of the training recipe and on a bf16 one."""

import pytest
import torch

from meanflow_kernels import adaln, adaln_jvp

from .dual_op import VARIANTS, Case, measure
from .shapes import MODELS, naming, on


def _plain(x, shift, scale, *, out_dtype=None):
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (y * (1 + scale[:, None]) + shift[:, None]).to(out_dtype or x.dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_adaln(benchmark, stopwatch, device, model, stream, variant):
    shape = on(device, MODELS[model])
    x, x_dot = torch.randn(2, shape.batch, shape.tokens, shape.width, device=device, dtype=stream)
    vectors = torch.randn(4, shape.batch, shape.width, device=device, dtype=stream)
    options = {"out_dtype": torch.bfloat16}
    case = Case(adaln, adaln_jvp, _plain, (x, *vectors[:2]), (x_dot, *vectors[2:]), options=options)
    measure(stopwatch, benchmark, case, naming("adaln", model, shape, stream, variant), *VARIANTS[variant])
