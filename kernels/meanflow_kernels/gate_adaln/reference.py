"""Gated residual followed by the next adaln, and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..adaln.reference import adaln_ref, adaln_tangent_ref
from ..precision import upcast


def gate_adaln_ref(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """x, y (B, L, C), gate, shift, scale (B, C), bias (C,) or None -> x + gate (y + bias), its adaln, not rounded."""
    x, y, gate, bias = upcast(x, y, gate, bias)
    y = y if bias is None else y + bias
    x = x + gate[:, None] * y
    return x, adaln_ref(x, shift, scale, eps=eps)


def gate_adaln_tangent_ref(
    primals: tuple, tangents: tuple, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Tangents of :func:`gate_adaln_ref`'s results: x_dot + gate_dot (y + bias) + gate y_dot, and its adaln's."""
    x, y, gate, shift, scale, bias = upcast(*primals, bias)
    y = y if bias is None else y + bias
    x_dot, y_dot, gate_dot, shift_dot, scale_dot = upcast(*tangents)
    out_dot = x.new_zeros(x.shape) if x_dot is None else x_dot
    if gate_dot is not None:
        out_dot = out_dot + gate_dot[:, None] * y
    if y_dot is not None:
        out_dot = out_dot + gate[:, None] * y_dot
    x = x + gate[:, None] * y
    return out_dot, adaln_tangent_ref((x, shift, scale), (out_dot, shift_dot, scale_dot), eps=eps)
