"""SwiGLU on (primal, tangent) pairs: checks and public functions. Every device runs the reference."""

import torch
from torch import Tensor

from ..checks import check_real, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..transforms import check_transforms
from .reference import swiglu_ref, swiglu_tangent_ref


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] % 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fail("x", got, "a tensor (B, ..., 2 h)", "lay the two products side by side")
    check_real("x", x)
    check_transforms(x)


def swiglu(x: Tensor) -> Tensor:
    """y = silu(a) b with a and b the halves of x's last dimension (Shazeer, arXiv 2002.05202).

    Args:
        x: (B, ..., 2 h), any strides: the product with both weights, one beside the other. Computed in fp32 whatever
            its dtype (fp64 where x is fp64).

    Returns:
        y (B, ..., h) in x's dtype. Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: x is no floating-point tensor of at least two dimensions, the last one even.
    """
    _check(x)
    primals, tangents = unpack(x)
    if not absent(tangents):
        return pack(*swiglu_jvp(primals, tangents))
    return swiglu_ref(*once(*primals)).to(x.dtype)


def swiglu_jvp(
    primals: tuple[Tensor], tangents: tuple[Tensor | None], *, tangent_start: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`swiglu` and its tangent silu'(a) a_dot b + silu(a) b_dot in one pass: (x,), (x_dot,) -> y, y_dot.

    Args:
        primals: x (B, ..., 2 h). tangents: x_dot (n, ..., 2 h), x's dtype; None is structurally zero.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, ..., h), and y_dot (n, ..., h) or None. Gradients flow through y to x; one asked of y_dot raises
        :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return swiglu(*primals), None
    (x,), (x_dot,) = primals, tangents
    _check(x)
    tangent_start, _ = check_tangents(("x",), primals, tangents, tangent_start)
    with torch.no_grad():
        y_dot = swiglu_tangent_ref(*tangent_rows(primals, tangents, tangent_start), x_dot).to(x.dtype)
    return swiglu_ref(*once(x)).to(x.dtype), forbid_gradient(y_dot, x, x_dot)
