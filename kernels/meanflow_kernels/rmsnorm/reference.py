"""RMSNorm with a learned weight, and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..precision import upcast


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def rmsnorm_ref(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x (..., C), weight (C,) -> y (..., C) = weight x_hat with x_hat = x / sqrt(mean(x^2) + eps), not yet rounded."""
    x, weight = upcast(x, weight)
    x_hat, _ = _normalise(x, eps)
    return x_hat * weight


def rmsnorm_tangent_ref(x: Tensor, weight: Tensor, x_dot: Tensor, *, eps: float) -> Tensor:
    """Tangent of :func:`rmsnorm_ref`: weight rstd (x_dot - x_hat mean(x_hat x_dot)), exact with eps."""
    x, weight, x_dot = upcast(x, weight, x_dot)
    x_hat, rstd = _normalise(x, eps)
    return weight * rstd * (x_dot - x_hat * (x_hat * x_dot).mean(-1, keepdim=True))
