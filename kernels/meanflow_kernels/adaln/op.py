"""LayerNorm + modulate on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import adaln_ref, adaln_tangent_ref


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None) -> Tensor:
    """x (B, L, C), shift and scale (B, C) -> LayerNorm(x) (1 + scale) + shift, (B, L, C) in out_dtype (default x's)."""
    return adaln_ref(x, shift, scale, eps=eps).to(out_dtype or x.dtype)


def adaln_jvp(primals, tangents, *, eps: float = 1e-6, out_dtype=None, tangent_start: int | None = None):
    """adaln and its tangent: (x, shift, scale), (x_dot, shift_dot, scale_dot) -> y, y_dot."""
    y = adaln(*primals, eps=eps, out_dtype=out_dtype)
    if absent(tangents):
        return y, None
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        return y, adaln_tangent_ref(rows, tangents, eps=eps).to(y.dtype)
