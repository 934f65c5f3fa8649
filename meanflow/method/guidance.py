"""What a network is told of its guidance: scale and interval, drawn for each sample of a training batch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ObjectiveConfig
from ..draws import Draws, Purpose


class GuidanceInputs(NamedTuple):
    """The guidance of each sample, as the network gets it after its labels."""

    omega: Tensor
    """The scale (B,)."""
    start: Tensor
    """Guidance acts where start <= t <= end (B,)."""
    end: Tensor

    def take(self, samples: Tensor) -> "GuidanceInputs":
        """Those of some samples."""
        return GuidanceInputs(*(x[samples] for x in self))


def told_to(config: ObjectiveConfig, inputs: GuidanceInputs | None) -> tuple[Tensor, ...]:
    """What of its guidance a network gets, behind its labels."""
    if inputs is None:
        return ()
    return inputs if config.guidance_input == "interval" else (inputs.omega,)


def omega_from_uniform(config: ObjectiveConfig, u: Tensor) -> Tensor:
    """Uniform numbers (B,) to scales on [1, omega_max] of a density that falls with omega^-omega_power."""
    rate = (1 - config.omega_power) * math.log(config.omega_max)
    if rate == 0:
        return config.omega_max**u
    return torch.exp(torch.log1p(u * math.expm1(rate)) / (1 - config.omega_power))


def arrange_guidance(
    config: ObjectiveConfig, u_omega: Tensor, u_start: Tensor, u_end: Tensor, equal: Tensor
) -> GuidanceInputs:
    """Uniform numbers (B,) to scales and intervals around 1/2; the interval is [0, 1] where equal says r = t."""
    start = torch.where(equal, 0, u_start / 2)
    end = torch.where(equal, 1, 0.5 + u_end / 2)
    return GuidanceInputs(omega_from_uniform(config, u_omega), start, end)


def draw_guidance(config: ObjectiveConfig, draws: Draws, equal: Tensor) -> GuidanceInputs | None:
    """The guidance of some samples, fp32, or None for a network that is told nothing (improved MeanFlow, appendix).

    equal: (B,) bool, who has r = t.
    """
    if config.guidance_input == "none":
        return None
    purposes = (Purpose.OMEGA, Purpose.GUIDANCE_START, Purpose.GUIDANCE_END)
    u_omega, u_start, u_end = (draws.uniform(purpose) for purpose in purposes)
    return arrange_guidance(config, u_omega, u_start, u_end, equal)
