"""SwiGLU of a packed product and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..precision import upcast


def swiglu_ref(x: Tensor) -> Tensor:
    """x (..., 2 h) = a | b -> (..., h), silu(a) b with silu(a) = a sigmoid(a), not yet rounded."""
    (x,) = upcast(x)
    a, b = x.chunk(2, -1)
    return a * a.sigmoid() * b


def swiglu_tangent_ref(x: Tensor, x_dot: Tensor) -> Tensor:
    """Tangent of :func:`swiglu_ref`: sigmoid(a) (1 + a (1 - sigmoid(a))) a_dot b + silu(a) b_dot."""
    x, x_dot = upcast(x, x_dot)
    (a, b), (a_dot, b_dot) = x.chunk(2, -1), x_dot.chunk(2, -1)
    s = a.sigmoid()
    return s * (1 + a * (1 - s)) * a_dot * b + a * s * b_dot
