"""Sinusoidal features of a time and their forward-mode derivative, as mathematics."""

import math

import torch
from torch import Tensor

from ..precision import upcast


def _angles(t: Tensor, dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    return t[:, None] * frequencies, frequencies


def timestep_embedding_ref(t: Tensor, dim: int, max_period: float) -> Tensor:
    """t (B,) -> (B, dim): cosines then sines of t max_period^(-i / (dim // 2)); an odd dim ends with a zero.

    Not yet rounded (DiT, Peebles & Xie, arXiv 2212.09748).
    """
    (t,) = upcast(t)
    angles, _ = _angles(t, dim, max_period)
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return torch.nn.functional.pad(features, (0, dim % 2))


def timestep_embedding_tangent_ref(t: Tensor, t_dot: Tensor, dim: int, max_period: float) -> Tensor:
    """Tangent of :func:`timestep_embedding_ref`."""
    t, t_dot = upcast(t, t_dot)
    angles, frequencies = _angles(t, dim, max_period)
    rate = t_dot[:, None] * frequencies
    return torch.nn.functional.pad(torch.cat([-angles.sin() * rate, angles.cos() * rate], -1), (0, dim % 2))
