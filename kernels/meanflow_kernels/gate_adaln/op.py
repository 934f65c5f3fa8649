"""Gated residual + the next adaln on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import gate_adaln_ref, gate_adaln_tangent_ref


def gate_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype=None):
    """x and y (B, L, C), gate, shift and scale (B, C) -> x + gate y (in x's dtype) and its adaln (in out_dtype)."""
    x_out, h = gate_adaln_ref(x, y, gate, shift, scale, eps=eps)
    return x_out.to(x.dtype), h.to(out_dtype or x.dtype)


def gate_adaln_jvp(primals, tangents, *, eps: float = 1e-6, out_dtype=None, tangent_start: int | None = None):
    """gate_adaln and its tangents: five primals, five tangents -> (x_out, h), (x_out_dot, h_dot)."""
    x_out, h = gate_adaln(*primals, eps=eps, out_dtype=out_dtype)
    if absent(tangents):
        return (x_out, h), (None, None)
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        x_dot, h_dot = gate_adaln_tangent_ref(rows, tangents, eps=eps)
    return (x_out, h), (x_dot.to(x_out.dtype), h_dot.to(h.dtype))
