"""Noise levels sigma and the denoiser of EDM (Karras et al., arXiv 2206.00364), x_sigma = x + sigma e.

    D(x_sigma, sigma) = c_skip x_sigma + c_out net(c_in x_sigma, c_noise)

Levels are drawn and subtracted in float64 (B,): neighbours of a fine grid differ in few digits.
"""

from collections.abc import Callable, Sequence
from math import erf, log, sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

LEAST = 1e-10
"""The least level that a network is told; at 0 its output is multiplied by 0."""

Form = Literal["boundary", "plain", "diffusers"]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x_sigma, sigma): (B, channels, height, width) and (B,) -> like x_sigma."""


def grid(count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """So many levels from sigma_min up to sigma_max (count,), their rho-th roots evenly spaced (EDM, Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + torch.arange(count, dtype=torch.float64) / (count - 1) * (high - low)) ** rho


def truncated_log_normal(u: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """Levels with ln sigma ~ N(mean, std^2), kept within [low, high], from uniform numbers u (B,)."""

    def cdf(sigma: float) -> float:
        return (1 + erf((log(sigma) - mean) / (std * sqrt(2)))) / 2

    u = cdf(low) + u.double() * (cdf(high) - cdf(low))
    return (mean + std * torch.special.ndtri(u)).exp().clamp(low, high)


class Scalings(NamedTuple):
    """The denoiser's factors at some levels (B,), in their dtype."""

    skip: Tensor
    out: Tensor
    into: Tensor
    """c_in."""
    noise: Tensor
    """c_noise: what the network is told of the level."""


def scalings(sigma: Tensor, sigma_data: float, sigma_min: float = 0.0, form: Form = "plain") -> Scalings:
    """The factors (EDM, Table 1), with c_noise = ln(sigma) / 4.

    boundary: with c_skip = 1 and c_out = 0 at sigma_min (consistency models, arXiv 2303.01469, appendix C).
    diffusers: as the consistency training script of diffusers has them, without a root in c_in or a scale of c_out.
    """
    data, total = sigma_data**2, sigma**2 + sigma_data**2
    noise = sigma.clamp(min=LEAST).log() / 4
    if form == "diffusers":
        return Scalings(data / total, sigma / total.sqrt(), 1 / total, noise)
    above = sigma - sigma_min if form == "boundary" else sigma
    return Scalings(data / (above**2 + data), sigma_data * above / total.sqrt(), total.rsqrt(), noise)


def scale(a: Tensor, x: Tensor) -> Tensor:
    """a (B,), in any dtype, times x (B, channels, height, width), in x's dtype."""
    return a.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x


def denoise(call: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, factors: Scalings) -> Tensor:
    """D(x, sigma) by one call(z, r, t) of a network, whose time t is c_noise, and r = 0."""
    out = call(scale(factors.into, x), torch.zeros_like(factors.noise), factors.noise)
    return scale(factors.skip, x) + scale(factors.out, out)


class AsVelocity(nn.Module):
    """A denoiser as the average velocity u(z, r, t | y) that sampling takes, z = (1 - t) x + t e: to r = 0 it is exact.

        u = (z - D(x_sigma, sigma)) / t,  sigma = t / (1 - t),  x_sigma = sigma / t z

    Args:
        net: the network. denoiser: (net, y) -> D. sigma_max: the level at t = 1, and the highest.
    """

    def __init__(self, net: Any, denoiser: Callable[[nn.Module, Tensor], Denoiser], sigma_max: float):
        super().__init__()
        self.net, self.denoiser, self.sigma_max = net, denoiser, sigma_max

    @property
    def in_channels(self) -> int:
        """See the network."""
        return self.net.in_channels

    @property
    def input_size(self) -> int:
        """See the network."""
        return self.net.input_size

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """z (B, channels, height, width), r, t (B,), y (B,) -> u, like z."""
        sigma = (t / (1 - t)).clamp(max=self.sigma_max)
        return scale(1 / t, z - self.denoiser(self.net, y)(scale(sigma / t, z), sigma))


@torch.no_grad()
def sample_by_renoising(
    denoiser: Denoiser,
    noise: Tensor,
    levels: Sequence[float],
    renoise: Sequence[Tensor] = (),
    sigma_min: float = 0.0,
    clip: float | None = None,
) -> Tensor:
    """Denoise, add noise of a lower level, denoise again (consistency models, arXiv 2303.01469, Algorithm 1).

    Args:
        denoiser: D(x, sigma), sigma (B,) in x's dtype.
        noise: standard normal (B, channels, height, width); renoise: as many more, one before each further call.
        levels: falling, one for each call.
        sigma_min: noise that denoised samples are taken to have still; FastGen takes none.
        clip: bound of what is denoised; None: none.
    """
    x, sample = levels[0] * noise, noise
    for i, level in enumerate(levels):
        if i:
            x = sample + max(level**2 - sigma_min**2, 0) ** 0.5 * renoise[i - 1]
        sample = denoiser(x, torch.full_like(x[:, 0, 0, 0], level))
        sample = sample if clip is None else sample.clamp(-clip, clip)
    return sample
