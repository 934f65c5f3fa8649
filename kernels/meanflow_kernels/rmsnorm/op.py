"""RMSNorm on (primal, tangent) pairs: checks and public functions. Every device runs the reference."""

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..transforms import check_transforms
from .reference import rmsnorm_ref, rmsnorm_tangent_ref


def _check(x: Tensor, weight: Tensor) -> None:
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_shape("weight", weight, (x.shape[2],), "(C,)")
    check_alike(("x", "weight"), (x, weight), dtype=False)
    for name, tensor in (("x", x), ("weight", weight)):
        check_real(name, tensor)
    check_parameter("weight", weight)
    check_transforms(x)


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = weight x / sqrt(mean(x^2) + eps), the mean over C (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: (B, L, C), any strides. Statistics are fp32 whatever its dtype (fp64 where x is fp64).
        weight: (C,), a parameter, of any dtype: it has no tangent.
        eps: added to the mean square. out_dtype: dtype of y, default x's.

    Returns:
        y (B, L, C). Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    _check(x, weight)
    out_dtype = out_dtype or x.dtype
    primals, tangents = unpack(x)
    if not absent(tangents):
        return pack(*rmsnorm_jvp(primals, tangents, weight, eps=eps, out_dtype=out_dtype))
    return rmsnorm_ref(*once(*primals, weight), eps=eps).to(out_dtype)


def rmsnorm_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rmsnorm` and its tangent in one pass: (x,), (x_dot,), weight -> y, y_dot.

    Args:
        primals: x (B, L, C). tangents: x_dot (n, L, C), x's dtype; None is structurally zero.
        weight, eps, out_dtype: as for :func:`rmsnorm`.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, L, C) and y_dot (n, L, C), both in out_dtype; (y, None) where the tangent is None. Gradients flow through
        y to x and weight; one asked of y_dot raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return rmsnorm(*primals, weight, eps=eps, out_dtype=out_dtype), None
    (x,), (x_dot,) = primals, tangents
    _check(x, weight)
    tangent_start, _ = check_tangents(("x",), primals, tangents, tangent_start)
    out_dtype = out_dtype or x.dtype
    with torch.no_grad():
        y_dot = rmsnorm_tangent_ref(*tangent_rows(primals, tangents, tangent_start), weight, x_dot, eps=eps).to(
            out_dtype
        )
    return rmsnorm_ref(*once(x, weight), eps=eps).to(out_dtype), forbid_gradient(y_dot, x, weight, x_dot)
