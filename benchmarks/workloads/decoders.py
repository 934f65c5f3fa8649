"""Ways to run diffusers' decoder of latents, with the options it has."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 256,
}
"""sd-vae-ft-mse's configuration, where it is not AutoencoderKL's default."""


@dataclass(frozen=True)
class Decode:
    """A way to run diffusers' decoder."""

    precision: str = "fp32"
    slicing: bool = False
    """Decode an image at a time: less memory."""
    tiling: bool = False
    """Decode a tile at a time: less memory, but seams."""
    channels_last: bool = False
    compiled: bool = False

    def passed_over(self, vae: nn.Module, latents: Tensor) -> str | None:
        """The reason why this way is not run: it is the plain one for these latents, or it would take minutes."""
        if self.precision == "bf16" and latents.device.type == "cpu" and not cpu_convolves_bf16():
            return "a CPU without AVX-512 takes minutes to convolve in bf16"
        if self.slicing and len(latents) == 1:
            return "slices are images, and there is one"
        tile = vae.tile_latent_min_size
        if self.tiling and latents.shape[-1] <= tile:
            return f"latents of {latents.shape[-1]} are no larger than a tile, {tile}"
        return None

    def apply(self, vae: nn.Module) -> nn.Module:
        """A copy of the decoder that runs this way."""
        # diffusers' own .to() warns of modules to keep in fp32, of which this class has none
        vae = nn.Module.to(copy.deepcopy(vae), DTYPES[self.precision])
        if self.slicing:
            vae.enable_slicing()
        if self.tiling:
            vae.enable_tiling()
        if self.channels_last:
            vae.to(memory_format=torch.channels_last)
        if self.compiled:
            vae.decoder.compile(fullgraph=True, dynamic=False)
        return vae


DECODES = {
    "plain": Decode(),
    "slicing": Decode(slicing=True),
    "tiling": Decode(tiling=True),
    "channels-last": Decode(channels_last=True),
    "compiled": Decode(compiled=True),
    "fp16": Decode("fp16"),
    "bf16": Decode("bf16"),
    "bf16-channels-last": Decode("bf16", channels_last=True),
    "bf16-compiled": Decode("bf16", channels_last=True, compiled=True),
}


def cpu_convolves_bf16() -> bool:
    """Whether oneDNN has convolutions in bf16 for this CPU: on x86 it asks for AVX-512."""
    has = torch.cpu.get_capabilities()
    return has["architecture"] != "x86_64" or has.get("avx512_bw", False)


def random_vae(device: str) -> nn.Module:
    """Stable Diffusion's autoencoder with random weights."""
    from diffusers import AutoencoderKL  # seconds to import

    torch.manual_seed(0)
    with torch.device(device):
        return AutoencoderKL(**SD_VAE).eval().requires_grad_(False)
