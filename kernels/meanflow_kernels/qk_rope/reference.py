"""RMSNorm of each head's query and key, rotated by their positions, and the forward-mode derivative, as mathematics."""

import torch
from torch import Tensor

from ..precision import upcast
from ..rmsnorm.reference import rmsnorm_ref, rmsnorm_tangent_ref


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Adjacent pairs of columns of x (B, L, H, D) by angles (L, D / 2), the same in every head."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def qk_rope_ref(
    qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """qk (B, L, 2, H, D), weights (D,), cos and sin (L, D / 2) -> q and k (B, L, H, D), not yet rounded.

    q = R rmsnorm(q) with R the rotation of columns (2 i, 2 i + 1) by the angle of i, which is linear.
    """
    qk, cos, sin = upcast(qk, cos, sin)
    q, k = qk.unbind(2)
    q, k = rmsnorm_ref(q, q_weight, eps=eps), rmsnorm_ref(k, k_weight, eps=eps)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def qk_rope_tangent_ref(
    qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, qk_dot: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Tangents of both results of :func:`qk_rope_ref`: the rotated tangents of the norms."""
    qk, cos, sin, qk_dot = upcast(qk, cos, sin, qk_dot)
    (q, k), (q_dot, k_dot) = qk.unbind(2), qk_dot.unbind(2)
    q_dot = rmsnorm_tangent_ref(q, q_weight, q_dot, eps=eps)
    k_dot = rmsnorm_tangent_ref(k, k_weight, k_dot, eps=eps)
    return _rotate(q_dot, cos, sin), _rotate(k_dot, cos, sin)
