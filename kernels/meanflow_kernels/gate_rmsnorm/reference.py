"""Gated residual followed by the next rmsnorm, and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..precision import upcast
from ..rmsnorm.reference import rmsnorm_ref, rmsnorm_tangent_ref


def gate_rmsnorm_ref(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """x and y (..., C), gate and weight (C,) -> x + gate y and its rmsnorm, both (..., C), not yet rounded."""
    x, y, gate = upcast(x, y, gate)
    x = x + gate * y
    return x, rmsnorm_ref(x, weight, eps=eps)


def gate_rmsnorm_tangent_ref(
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None],
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Tangents of both results of :func:`gate_rmsnorm_ref`: x_dot + gate y_dot, and its rmsnorm's."""
    x, y, x_dot, y_dot, gate = upcast(*primals, *tangents, gate)
    out_dot = x.new_zeros(x.shape) if x_dot is None else x_dot
    if y_dot is not None:
        out_dot = out_dot + gate * y_dot
    return out_dot, rmsnorm_tangent_ref(x + gate * y, weight, out_dot, eps=eps)
