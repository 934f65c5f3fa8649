"""Latents as a network sees them, and the decoder that makes images of these."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig
from .cache import read_manifest
from .vae import check_vae, load_vae


def normalise(latents: Tensor, config: DataConfig) -> Tensor:
    """The autoencoder's latents (B, channels, size, size) as the network sees them."""
    if config.latent_std:
        # by numbers, not a tensor of them: nothing is copied to the device
        each = zip(latents.unbind(1), config.latent_mean, config.latent_std, strict=True)
        latents = torch.stack([(x - mean) / std for x, mean, std in each], 1)
    return latents * config.scale


def _denormalise(latents: Tensor, config: DataConfig) -> Tensor:
    latents = latents / config.scale
    if not config.latent_std:
        return latents
    each = zip(latents.unbind(1), config.latent_mean, config.latent_std, strict=True)
    return torch.stack([x * std + mean for x, mean, std in each], 1)


def make_decoder(config: DataConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Make a function from latents to images (B, 1 or 3, height, width) in [-1, 1]; the identity in pixels.

    Raises:
        UserError: where the autoencoder cannot be loaded, or is not the one that the latents at data.path are of.
    """
    if config.in_pixels:
        return lambda latents: latents
    vae = load_vae(config.vae, device, "data.vae")
    # sampling may run where the latents are not
    if (Path(config.path) / "manifest.json").exists():
        check_vae(config.vae, vae, read_manifest(Path(config.path)))

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        images = torch.cat([vae.decode(_denormalise(part, config)).sample for part in latents.split(16)])
        return images if config.pixels == "symmetric" else 2 * images - 1

    return decode
