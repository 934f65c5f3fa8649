"""Softmax attention and its forward-mode derivative, as mathematics."""

import torch
from torch import Tensor

from ..precision import upcast


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Non-causal softmax attention.

    q (B, M, H, D), k and v (B, N, H, D) -> o (B, M, H, D) in q's dtype, lse (B, H, M), natural logarithm.
    """
    q_, k_, v_ = upcast(q, k, v)
    s = scale * torch.einsum("bmhd,bnhd->bhmn", q_, k_)
    lse = s.logsumexp(-1)
    p = (s - lse[..., None]).exp()
    o = torch.einsum("bhmn,bnhd->bmhd", p, v_)
    return o.to(q.dtype), lse


def attention_tangent_ref(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    scale: float,
) -> Tensor:
    """Tangent of :func:`attention_ref`; a ``None`` tangent is structurally zero.

    s_dot = scale (q_dot k^T + q k_dot^T),  p_dot = p (s_dot - sum_n p s_dot),  o_dot = p_dot v + p v_dot
    """
    q, k, v = upcast(*primals)
    q_dot, k_dot, v_dot = upcast(*tangents)
    p = (scale * torch.einsum("bmhd,bnhd->bhmn", q, k)).softmax(-1)
    s_dot = torch.zeros_like(p)
    if q_dot is not None:
        s_dot = s_dot + scale * torch.einsum("bmhd,bnhd->bhmn", q_dot, k)
    if k_dot is not None:
        s_dot = s_dot + scale * torch.einsum("bmhd,bnhd->bhmn", q, k_dot)
    p_dot = p * (s_dot - (p * s_dot).sum(-1, keepdim=True))
    o_dot = torch.einsum("bhmn,bnhd->bmhd", p_dot, v)
    if v_dot is not None:
        o_dot = o_dot + torch.einsum("bhmn,bnhd->bmhd", p, v_dot)
    return o_dot.to(primals[0].dtype)
