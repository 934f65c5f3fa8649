"""Sinusoidal features of the times, 256 of them, in fp32: so small that the launch is what it costs."""

import pytest
import torch

from meanflow_kernels import timestep_embedding, timestep_embedding_jvp

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, measure
from .workloads.shapes import MODELS, naming, size_for

DIM = 256


# the times are no leaves of a training step: nothing differentiates them in reverse
FORWARD = [name for name, (call, _) in VARIANTS.items() if call != "backward"]


@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize("model", MODELS)
def test_timestep_embedding(benchmark, timer, device, model, variant):
    shape = size_for(device, MODELS[model])
    t, t_dot = torch.rand(2, shape.batch, device=device)
    case = Case(timestep_embedding, timestep_embedding_jvp, plain.timestep_embedding, (t,), (t_dot,), (DIM,))
    name = naming("timestep_embedding", model, shape, t.dtype, variant)
    measure(timer, benchmark, case, name, *VARIANTS[variant])
