"""FLOPs and bytes of the operators.

FLOPs are the multiplications and additions of matrix products, the convention of torch's FLOP counter and of every
published MFU: a pointwise operator counts none, and what it costs is its bytes. With B batch, H heads, M queries,
N keys, D head width, K and C in and out channels, R rows (all leading sizes of a linear's input together):

    attention                   4 B H M N D       q k^T and p v
    its tangent                 8 B' H M N D      q_dot k^T, q k_dot^T, p v_dot and (p s_dot) v, of B' samples;
                                                  a product with a structurally zero tangent is not there
    attention and its tangent  12 B H M N D       six products, where every sample has a tangent
    its backward               10 B H M N D       q k^T again, dv, dp, dq and dk: 2.5 times the forward
    linear                      2 R K C           of the primal's rows and of the tangent's
    its backward                4 R K C           dx and dweight, of the primal's rows alone
    all others                  0

Bytes are the fewest that must move: each tensor read once, each result written once.

Importing the package registers the FLOPs of its operators with ``torch.utils.flop_counter``, so that a
``FlopCounterMode`` around a whole step counts the kernels, forward and backward. A linear is torch's own product,
which the counter knows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.meanflow_kernels


@dataclass(frozen=True)
class Work:
    """What a call has to do at least."""

    flops: int
    """Multiplications and additions of its matrix products."""
    bytes: int
    """Each input read once, each output written once."""


def attention_flops(batch: int, heads: int, m: int, n: int, d: int) -> int:
    """FLOPs of the primal alone."""
    return 4 * batch * heads * m * n * d


def attention_tangent_flops(batch: int, heads: int, m: int, n: int, d: int, *, q=True, k=True, v=True) -> int:
    """FLOPs that the tangents of ``batch`` samples add; ``q``, ``k`` and ``v`` say which inputs have one."""
    products = int(q) + int(k) + int(v) + int(q or k)
    return 2 * products * batch * heads * m * n * d


def attention_bwd_flops(batch: int, heads: int, m: int, n: int, d: int) -> int:
    """FLOPs of the primal's backward, which computes q k^T anew."""
    return 10 * batch * heads * m * n * d


def linear_flops(rows: int, k: int, c: int) -> int:
    """FLOPs of ``rows`` rows, primal or tangent, through a (c, k) weight."""
    return 2 * rows * k * c


def moved_bytes(read: Iterable[Tensor | object], written: Iterable[Tensor | object]) -> int:
    """Bytes of the tensors among ``read`` and ``written``; a view counts the elements that it shows."""
    return sum(x.numel() * x.element_size() for x in [*read, *written] if isinstance(x, Tensor))


_POINTWISE = (
    "adaln",
    "gate_adaln",
    "bias_gelu",
    "rmsnorm",
    "gate_rmsnorm",
    "qk_rope",
    "silu",
    "swiglu",
    "timestep_embedding",
)


@register_flop_formula(_ops.attention)
def _attention(q, k, v, *_, **__) -> int:
    batch, m, heads, d = q
    return attention_flops(batch, heads, m, k[1], d)


@register_flop_formula(_ops.attention_jvp)
def _attention_jvp(q, k, v, q_dot, k_dot, v_dot, *_, **__) -> int:
    _, m, heads, d = q
    tangents = {"q": q_dot is not None, "k": k_dot is not None, "v": v_dot is not None}
    # the tangents may belong to a slice of the batch
    samples = next(x[0] for x in (q_dot, k_dot, v_dot) if x is not None)
    return _attention(q, k, v) + attention_tangent_flops(samples, heads, m, k[1], d, **tangents)


@register_flop_formula(_ops.attention_bwd)
def _attention_bwd(do, q, k, *_, **__) -> int:
    batch, m, heads, d = q
    return attention_bwd_flops(batch, heads, m, k[1], d)


def _split(qkv) -> list[tuple[int, ...]]:
    """Shapes of q, k and v in a packed projection."""
    batch, length, _, heads, d = qkv
    return [(batch, length, heads, d)] * 3


@register_flop_formula(_ops.attention_qkv)
def _attention_qkv(qkv, *_, **__) -> int:
    return _attention(*_split(qkv))


@register_flop_formula(_ops.attention_qkv_jvp)
def _attention_qkv_jvp(qkv, bias, qkv_dot, *_, **__) -> int:
    return _attention_jvp(*_split(qkv), *_split(qkv_dot))


@register_flop_formula(_ops.attention_qkv_bwd)
def _attention_qkv_bwd(do, qkv, *_, **__) -> int:
    return _attention_bwd(do, *_split(qkv))


@register_flop_formula(
    [_ops.join, *[getattr(_ops, name + call) for name in _POINTWISE for call in ("", "_jvp", "_bwd")]]
)
def _pointwise(*_, **__) -> int:
    return 0
