"""LayerNorm without affine, modulated by (shift, scale), and its forward-mode derivative, as mathematics."""

from torch import Tensor

from ..precision import upcast


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """x (B, L, C), shift and scale (B, C) -> y (B, L, C) = x_hat (1 + scale) + shift, not yet rounded."""
    x, shift, scale = upcast(x, shift, scale)
    x_hat, _ = _normalise(x, eps)
    return x_hat * (1 + scale[:, None]) + shift[:, None]


def adaln_tangent_ref(
    primals: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor | None, Tensor | None, Tensor | None], *, eps: float
) -> Tensor:
    """Tangent of :func:`adaln_ref`; a ``None`` tangent is structurally zero.

    x_hat_dot = rstd (x_dot - mean(x_dot) - x_hat mean(x_hat x_dot))
    y_dot = x_hat_dot (1 + scale) + x_hat scale_dot + shift_dot
    """
    x, _, scale = upcast(*primals)
    x_dot, shift_dot, scale_dot = upcast(*tangents)
    x_hat, rstd = _normalise(x, eps)
    y_dot = x.new_zeros(x.shape)
    if x_dot is not None:
        centred = x_dot - x_dot.mean(-1, keepdim=True) - x_hat * (x_hat * x_dot).mean(-1, keepdim=True)
        y_dot = y_dot + rstd * centred * (1 + scale[:, None])
    if scale_dot is not None:
        y_dot = y_dot + x_hat * scale_dot[:, None]
    if shift_dot is not None:
        y_dot = y_dot + shift_dot[:, None]
    return y_dot
