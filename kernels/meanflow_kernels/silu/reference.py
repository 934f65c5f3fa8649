"""SiLU and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..precision import upcast


def silu_ref(x: Tensor) -> Tensor:
    """x sigmoid(x), not yet rounded."""
    (x,) = upcast(x)
    return x * x.sigmoid()


def silu_tangent_ref(x: Tensor, x_dot: Tensor) -> Tensor:
    """Tangent of :func:`silu_ref`: sigmoid(x) (1 + x (1 - sigmoid(x))) x_dot."""
    x, x_dot = upcast(x, x_dot)
    s = x.sigmoid()
    return s * (1 + x * (1 - s)) * x_dot
