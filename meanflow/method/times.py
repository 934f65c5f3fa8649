"""Draws of a training batch: its times (r, t), and which samples train on the null class."""

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..recipe import ObjectiveConfig


def equal_prefix(config: ObjectiveConfig, batch: int) -> int:
    """How many samples at the start of a device's batch have r = t, whatever is drawn (official: truncated)."""
    return int(batch * config.share_equal) if config.equal_placement == "first" else 0


def equal_mask(config: ObjectiveConfig, draws: Draws) -> Tensor:
    """Which samples have r = t, (B,) bool."""
    samples = draws.samples
    if config.equal_placement == "bernoulli":
        return draws.uniform(Purpose.EQUAL) < config.share_equal
    return torch.arange(len(samples), device=samples.device) < equal_prefix(config, len(samples))


def draw_times(config: ObjectiveConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Draw the times r <= t, each (B,) fp32, of one device's batch (paper, section 4.3)."""
    draw = draws.normal if config.time_distribution == "logit_normal" else draws.uniform
    return arrange_times(draw(Purpose.TIME_A), draw(Purpose.TIME_B), equal_mask(config, draws), config)


def arrange_times(a: Tensor, b: Tensor, equal: Tensor, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Turn two base draws (B,), normal or uniform, into r <= t: map them, sort them, set r = t where equal is true."""
    if config.time_distribution == "logit_normal":
        a = (a * config.time_std + config.time_mean).sigmoid()
        b = (b * config.time_std + config.time_mean).sigmoid()
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    if config.equal_time == "single":
        t = torch.where(equal, a, t)
    return torch.where(equal, t, r), t


def drop_mask(config: ObjectiveConfig, uniforms: Tensor) -> Tensor:
    """Which samples of a device's batch train on the null class, from one uniform number a sample (B,)."""
    drop = uniforms < config.label_drop
    if config.drop_placement == "bernoulli":
        return drop
    return torch.arange(len(drop), device=drop.device) < drop.sum()


def column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), by the dimensions of like."""
    return a.reshape(-1, *[1] * (like.ndim - 1))
