"""Noise levels sigma and the denoiser of EDM (Karras et al., arXiv 2206.00364), x_sigma = x + sigma e.

    D(x_sigma, sigma) = c_skip x_sigma + c_out net(c_in x_sigma, c_noise)

Levels are drawn and subtracted in float64 (B,): neighbours of a fine grid differ in few digits.
"""

from collections.abc import Callable, Sequence
from math import erf, log, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objective_options import Denoising, Form

LEAST = 1e-10
"""The least level that a network is told; at 0 its output is multiplied by 0."""

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


def denoiser(denoising: Denoising, net: Any, y: Tensor) -> Denoiser:
    """D(x_sigma, sigma) of a network for labels y (B,), to draw by `sample_by_renoising`.

    In these coordinates f of TrigFlow (sCM) is D of the plain form.
    """

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        data = denoising.sigma_data
        factors = scalings(sigma, data, denoising.sigma_min, denoising.form)
        if denoising.time_input == "angle":
            factors = factors._replace(noise=(sigma / data).atan())
        return denoise(lambda z, r, t: net(z, r, t, y), x, factors)

    return denoised


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
