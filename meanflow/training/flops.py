"""Floating-point operations of a training step's matrix products: for the MFU of the log, and for equal budgets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow_kernels.routing import Route, force_route

from ..config import ModelConfig
from ..method.contract import Objective
from ..method.passes import Pass
from ..model.build import build_net

SAMPLES = 2
DRAWN_STEPS = 50
"""Steps whose plans a mean is taken over."""
PHASED_STEPS = 400
"""The same of an objective with phases."""


class SampleFlops(NamedTuple):
    """Operations of one sample's passes, by torch's counter on the network itself."""

    forward: float
    """Of one velocity, as guidance and samples take it."""
    primal: float
    """Of one with all heads: the same, or with a head for v both."""
    tangent: float
    backward: float

    def of_passes(self, passes: dict[str, Pass]) -> float:
        """Operations of a step's passes."""
        return sum(self._of_pass(each) for each in passes.values())

    def _of_pass(self, each: Pass) -> float:
        a_row = self.primal if each.head == "uv" else self.forward
        return each.rows * (a_row + self.backward * each.trained) + each.tangents * self.tangent


def sample_flops(config: ModelConfig) -> SampleFlops:
    """Count a network's passes, on meta tensors."""
    with torch.device("meta"):
        net = build_net(config)
        z = torch.empty(SAMPLES, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(SAMPLES), torch.empty(SAMPLES, dtype=torch.long)
    heads = {"head": "uv"} if config.head_depth else {}

    def count(fn: Callable[[], object]) -> tuple[float, Any]:
        with FlopCounterMode(display=False) as counter:
            result = fn()
        return counter.get_total_flops() / SAMPLES, result

    with force_route(Route.TRITON):
        forward, _ = count(lambda: net(z, t, t, y))
        primal, outputs = count(lambda: net(z, t, t, y, **heads))
        backward, _ = count(lambda: sum(u.sum() for u in (outputs if heads else (outputs,))).backward())
        dual, _ = count(lambda: net(z, t, t, y, **heads, tangents=(z, None, t), tangent_start=0))
    return SampleFlops(forward, primal, dual - primal, backward)


def step_flops(model: ModelConfig, objective: Objective) -> float:
    """Operations of a training step in one process: the mean over the first steps that a run of seed 0 draws, or over
    steps of the whole run where they change.
    """
    flops, steps = sample_flops(model), range(DRAWN_STEPS)
    if objective.phased:
        steps = [i * objective.steps // PHASED_STEPS for i in range(PHASED_STEPS)]

    def of_step(step: int) -> float:
        return flops.of_passes(objective.passes(objective.sizes(objective.drawn(0, step, 0), exact=True)))

    return sum(map(of_step, steps)) / len(steps)
