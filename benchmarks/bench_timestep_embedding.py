"""Sinusoidal features of the times, 256 of them, in fp32: so small that the launch is what it costs."""

import math

import pytest
import torch

from meanflow_kernels import timestep_embedding, timestep_embedding_jvp

from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for

DIM = 256


def _plain(t, dim):
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# the times are no leaves of a training step: nothing differentiates them in reverse
FORWARD = [name for name, (call, _) in VARIANTS.items() if call != "backward"]


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("model", MODELS)
def test_timestep_embedding(benchmark, timer, device, model, variant):
    shape = size_for(device, MODELS[model])
    t, t_dot = torch.rand(2, shape.batch, device=device)
    case = Case(timestep_embedding, timestep_embedding_jvp, _plain, (t,), (t_dot,), (DIM,))
    name = naming("timestep_embedding", model, shape, t.dtype, variant)
    measure(timer, benchmark, case, name, *VARIANTS[variant])
