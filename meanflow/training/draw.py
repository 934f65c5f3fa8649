"""What a step draws for its samples beside their times: data from posteriors, mirroring, noise."""

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..data.dataset import Batch
from ..draws import Draws, Purpose


def draw_flips(draws: Draws) -> Tensor:
    """Which samples are mirrored (B,) bool: each by a coin."""
    return draws.uniform(Purpose.FLIP) < 0.5


def draw_latents(batch: Batch, draws: Draws, config: DataConfig) -> Tensor:
    """What the network learns (B, channels, size, size) fp32: the posterior drawn and scaled, mirrored as marked.

    The batch must be on the draws' device.
    """
    x = batch.mean.float()
    if batch.std is not None:
        if config.sample_posterior:
            x = x + batch.std.float() * draws.normal(Purpose.POSTERIOR, tuple(x.shape[1:]))
        x = x * config.scale
    if batch.flip is not None:
        x = torch.where(batch.flip[:, None, None, None], x.flip(-1), x)
    return x


def draw_noise(x: Tensor, draws: Draws) -> Tensor:
    """Standard normal noise shaped like the batch x."""
    return draws.normal(Purpose.NOISE, tuple(x.shape[1:])).to(x.dtype)


def draw_batch(config: RunConfig, batch: Batch, samples: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Data x and noise e of a step, each (B, channels, size, size)."""
    draws = Draws(config.train.seed, step, samples)
    x = draw_latents(batch, draws, config.data)
    return x, draw_noise(x, draws)
