"""Gated residual + the next rmsnorm on (primal, tangent) pairs: checks and public functions.

Every device runs the reference.
"""

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..transforms import check_transforms
from .reference import gate_rmsnorm_ref, gate_rmsnorm_tangent_ref

_NAMES = ("x", "y", "gate", "weight")


def _check(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> None:
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_shape("y", y, tuple(x.shape), "x's shape (B, L, C)")
    for name, vector in (("gate", gate), ("weight", weight)):
        check_shape(name, vector, (x.shape[2],), "(C,)")
        check_parameter(name, vector)
    tensors = (x, y, gate, weight)
    check_alike(_NAMES, tensors, dtype=False)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        check_real(name, tensor)
    check_transforms(x)


def gate_rmsnorm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x_out = x + gate y, and h = rmsnorm(x_out): a branch's end and the next one's beginning.

    Args:
        x: the residual stream (B, L, C). y: the branch (B, L, C), of a dtype of its own. Any strides.
        gate: (C,), the same for every sample. weight: (C,), of the norm. Parameters, of any dtype: no tangents.
        eps: added to the mean square. out_dtype: dtype of h, default x's.

    Returns:
        x_out (B, L, C) in x's dtype, and h (B, L, C) in out_dtype, normalised from the sum before it is rounded.
        Under forward-mode AD both carry their tangents.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    _check(x, y, gate, weight)
    out_dtype = out_dtype or x.dtype
    primals, tangents = unpack(x, y)
    if not absent(tangents):
        (x_out, h), (x_out_dot, h_dot) = gate_rmsnorm_jvp(primals, tangents, gate, weight, eps=eps, out_dtype=out_dtype)
        return pack(x_out, x_out_dot), pack(h, h_dot)
    x_out, h = gate_rmsnorm_ref(*once(*primals, gate, weight), eps=eps)
    return x_out.to(x.dtype), h.to(out_dtype)


def gate_rmsnorm_jvp(
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None],
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """:func:`gate_rmsnorm` and its tangents in one pass: (x, y), (x_dot, y_dot), gate, weight -> (x_out, h), theirs.

    Args:
        primals: as for :func:`gate_rmsnorm`.
        tangents: each shaped like its primal but for the batch n, in its dtype; None is structurally zero.
        gate, weight, eps, out_dtype: as for :func:`gate_rmsnorm`.
        tangent_start: the tangents belong to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        (x_out, h), (x_out_dot, h_dot); the tangents are (n, L, C), in the dtypes of their primals, and both None where
        every tangent is None. Gradients flow through x_out and h to x, y, gate and weight; one asked of a tangent
        raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return gate_rmsnorm(*primals, gate, weight, eps=eps, out_dtype=out_dtype), (None, None)
    _check(*primals, gate, weight)
    tangent_start, _ = check_tangents(_NAMES[:2], primals, tangents, tangent_start)
    x_dtype, out_dtype = primals[0].dtype, out_dtype or primals[0].dtype
    x_out, h = gate_rmsnorm_ref(*once(*primals, gate, weight), eps=eps)
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        x_out_dot, h_dot = gate_rmsnorm_tangent_ref(rows, tangents, gate, weight, eps=eps)
    inputs = (*primals, *tangents, gate, weight)
    x_out_dot, h_dot = forbid_gradient(x_out_dot.to(x_dtype), *inputs), forbid_gradient(h_dot.to(out_dtype), *inputs)
    return (x_out.to(x_dtype), h.to(out_dtype)), (x_out_dot, h_dot)
