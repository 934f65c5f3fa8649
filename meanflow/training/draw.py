"""Draws of a step beside its times: data from posteriors, mirroring, noise."""

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..data.dataset import Batch
from ..data.decoder import normalise
from ..draws import Draws, Purpose


def draw_flips(draws: Draws) -> Tensor:
    """Which samples to mirror (B,) bool: each with probability one half."""
    return draws.uniform(Purpose.FLIP) < 0.5


def draw_latents(batch: Batch, draws: Draws, config: DataConfig) -> Tensor:
    """Data (B, channels, size, size) fp32: posteriors drawn and scaled, mirrored where marked; on the draws' device."""
    x = batch.mean.float()
    if batch.std is not None:
        if config.sample_posterior:
            x = x + batch.std.float() * draws.normal(Purpose.POSTERIOR, tuple(x.shape[1:]))
        x = normalise(x, config)
    if batch.flip is not None:
        x = torch.where(batch.flip[:, None, None, None], x.flip(-1), x)
    return x


def draw_batch(config: RunConfig, batch: Batch, samples: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise e of a step, each (B, channels, size, size)."""
    draws = Draws(config.train.seed, step, samples)
    x = draw_latents(batch, draws, config.data)
    return x, draws.normal(Purpose.NOISE, tuple(x.shape[1:])).to(x.dtype)
