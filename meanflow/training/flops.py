"""Floating-point operations of a training step's matrix products, for the MFU of the log."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow_kernels.routing import Route, force_route

from ..config import ModelConfig
from ..method.plan import Plan
from ..model.build import build_net

SAMPLES = 2


class SampleFlops(NamedTuple):
    """Operations of one sample's passes, by torch's counter on the network itself."""

    forward: float
    tangent: float
    backward: float

    def of_plan(self, plan: Plan) -> float:
        """Operations that a batch needs, without the padding of its guidance group."""
        rows = int(plan.guided.sum()) + int((plan.cond_row >= 0).sum())
        batch = len(plan.guided)
        # the derivative's padding (equal_placement bernoulli only) is counted: a sixteenth of a batch on average
        return (rows + batch) * self.forward + len(plan.tangent) * self.tangent + batch * self.backward


def sample_flops(config: ModelConfig) -> SampleFlops:
    """Count a network's passes, on meta tensors."""
    with torch.device("meta"):
        net = build_net(config)
        z = torch.empty(SAMPLES, config.in_channels, config.input_size, config.input_size)
        t, y = torch.empty(SAMPLES), torch.empty(SAMPLES, dtype=torch.long)

    def count(fn: Callable[[], object]) -> tuple[float, Any]:
        with FlopCounterMode(display=False) as counter:
            result = fn()
        return counter.get_total_flops() / SAMPLES, result

    with force_route(Route.TRITON):
        forward, u = count(lambda: net(z, t, t, y))
        backward, _ = count(lambda: u.sum().backward())
        dual, _ = count(lambda: net(z, t, t, y, tangents=(z, None, t), tangent_start=0))
    return SampleFlops(forward, dual - forward, backward)
