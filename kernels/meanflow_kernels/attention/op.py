"""Softmax attention on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import attention_ref, attention_tangent_ref


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Non-causal softmax attention: q (B, M, H, D), k and v (B, N, H, D) -> o (B, M, H, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attention_ref(q, k, v, scale=scale)[0]


def attention_jvp(primals, tangents, *, scale: float | None = None, tangent_start: int | None = None):
    """Attention and its tangent: (q, k, v), (q_dot, k_dot, v_dot) -> o, o_dot."""
    scale = primals[0].shape[-1] ** -0.5 if scale is None else scale
    o = attention(*primals, scale=scale)
    if absent(tangents):
        return o, None
    with torch.no_grad():
        return o, attention_tangent_ref(tangent_rows(primals, tangents, tangent_start), tangents, scale=scale)
