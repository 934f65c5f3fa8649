"""QK-norm and rotary embedding on (primal, tangent) pairs: checks and public functions.

Every device runs the reference. The rotation is real arithmetic: one by Tensor.view(complex) has neither a gradient nor
a tangent.
"""

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..transforms import check_transforms
from .reference import qk_rope_ref, qk_rope_tangent_ref

_NAMES = ("qkv", "q_weight", "k_weight", "cos", "sin")


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_shape("qkv", qkv, (None, None, 3, None, None), "(B, L, 3, H, D)")
    length, head_dim = qkv.shape[1], qkv.shape[4]
    if head_dim % 2:
        fail("qkv", f"head dim {head_dim}", "an even number", "adjacent columns are rotated in pairs")
    shapes = {"q_weight": (head_dim,), "k_weight": (head_dim,)}
    shapes |= {"cos": (length, head_dim // 2), "sin": (length, head_dim // 2)}
    tensors = (qkv, q_weight, k_weight, cos, sin)
    for name, tensor in zip(_NAMES[1:], tensors[1:], strict=True):
        check_shape(name, tensor, shapes[name], "(D,)" if name.endswith("weight") else "(L, D / 2)")
        check_parameter(name, tensor)
    check_alike(_NAMES, tensors, dtype=False)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        check_real(name, tensor)
    check_transforms(qkv)


def qk_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Queries and keys for attention: RMSNorm over D of each head, then rotary embedding (Su et al., arXiv 2104.09864).

    Args:
        qkv: a packed projection (B, L, 3, H, D), D even, any strides, whose values are not read and stay where they
            are: attention takes ``qkv[:, :, 2]``. Computed in fp32 whatever its dtype (fp64 where it is fp64).
        q_weight, k_weight: (D,), of the norms, shared by the heads. Parameters, of any dtype: no tangents.
        cos, sin: (L, D / 2) of the angles by which columns (2 i, 2 i + 1) are rotated; constants, in fp32 or more.
        eps: added to the mean square.

    Returns:
        q and k (B, L, H, D) in qkv's dtype. Under forward-mode AD both carry their tangents.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    _check(qkv, q_weight, k_weight, cos, sin)
    primals, tangents = unpack(qkv)
    if not absent(tangents):
        (q, k), (q_dot, k_dot) = qk_rope_jvp(primals, tangents, q_weight, k_weight, cos, sin, eps=eps)
        return pack(q, q_dot), pack(k, k_dot)
    q, k = qk_rope_ref(*once(*primals, q_weight, k_weight), cos, sin, eps=eps)
    return q.to(qkv.dtype), k.to(qkv.dtype)


def qk_rope_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    tangent_start: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """:func:`qk_rope` and its tangents in one pass: (qkv,), (qkv_dot,), weights, table -> (q, k), (q_dot, k_dot).

    Args:
        primals: qkv (B, L, 3, H, D). tangents: qkv_dot (n, L, 3, H, D), qkv's dtype; None is structurally zero.
        q_weight, k_weight, cos, sin, eps: as for :func:`qk_rope`.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        (q, k) and (q_dot, k_dot), the tangents (n, L, H, D), or (None, None). Gradients flow through q and k to qkv and
        the weights; one asked of a tangent raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return qk_rope(*primals, q_weight, k_weight, cos, sin, eps=eps), (None, None)
    (qkv,), (qkv_dot,) = primals, tangents
    _check(qkv, q_weight, k_weight, cos, sin)
    tangent_start, _ = check_tangents(("qkv",), primals, tangents, tangent_start)
    q, k = qk_rope_ref(*once(qkv, q_weight, k_weight), cos, sin, eps=eps)
    with torch.no_grad():
        (rows,) = tangent_rows(primals, tangents, tangent_start)
        q_dot, k_dot = qk_rope_tangent_ref(rows, q_weight, k_weight, cos, sin, qkv_dot, eps=eps)
    inputs, dtype = (qkv, q_weight, k_weight, qkv_dot), qkv.dtype
    return (q.to(dtype), k.to(dtype)), (
        forbid_gradient(q_dot.to(dtype), *inputs),
        forbid_gradient(k_dot.to(dtype), *inputs),
    )
