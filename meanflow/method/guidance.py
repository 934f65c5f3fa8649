"""What a network is told of its guidance: scale and interval, drawn in training, and chosen when it samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..errors import require
from ..recipe import ModelConfig, ObjectiveConfig


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


BEST = {  # omega, start, end of the lowest FID in one step (improved MeanFlow's code)
    "imf-B/2": (8.0, 0.4, 0.65),
    "imf-M/2": (10.5, 0.4, 0.6),
    "imf-L/2": (10.5, 0.4, 0.6),
    "imf-XL/2": (8.0, 0.42, 0.62),
}
ELSEWHERE = (1.0, 0.0, 1.0)
"""No guidance, for other networks, of which nothing is published."""


TOLD = {
    "none": (0, "none: this network is told nothing"),
    "omega": (1, "omega"),
    "interval": (3, "omega, start and end"),
}
"""How many numbers a network is told, and which."""


def sampling_guidance(
    model: ModelConfig, objective: ObjectiveConfig, given: Sequence[float] = (), option: str = "guidance"
) -> tuple[float, ...]:
    """What a network is told of its guidance when it samples: the numbers given, or the official best of its size.

    Returns:
        omega, start and end; omega alone, or nothing, for a network that is told no more.

    Raises:
        UserError: for numbers that it cannot be told; option: their name.
    """
    count, wanted = TOLD[objective.guidance_input]
    require(len(given) in (0, count), option, given, wanted, "leave it out, or give all of them")
    omega, start, end = (*given, *BEST.get(model.name, ELSEWHERE)[len(given) :])
    wanted = "omega of 1 or more, and 0 <= start <= end <= 1"
    require(omega >= 1 and 0 <= start <= end <= 1, option, given, wanted, "change it")
    return (omega, start, end)[:count]
