"""Softmax attention on (primal, tangent) pairs: checks, launches, registration and the public functions."""

import functools
import math
import warnings

import torch
from torch import Tensor

from ..checks import check_alike, check_interpreted, check_kernel_dtype, check_real, check_shape, check_tangents, fail
from ..dual import absent, guard, last, once, pack, refuse_tangent_gradient, tangent_rows, unpack
from ..launch import arch_of
from ..routing import runs_kernel
from .backends import attention_backward, attention_forward, empty_outputs
from .config import BESIDE, FORWARD, dual_config
from .launches import aligned, forward_launch
from .reference import attention_ref, attention_tangent_ref

_NAMES = ("q", "k", "v")


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[float, bool]:
    """Shapes, dtypes and devices of the primals; returns the scale and whether the kernel runs."""
    check_shape("q", q, (None, None, None, None), "(B, M, H, D)")
    batch, _, heads, head_dim = q.shape
    check_shape("k", k, (batch, None, heads, head_dim), "(B, N, H, D)")
    check_shape("v", v, tuple(k.shape), "(B, N, H, D)")
    check_alike(_NAMES, (q, k, v))
    check_real("q", q)
    if not torch.compiler.is_compiling() and max(q.shape[1], k.shape[1]) < heads:
        _warn(max(q.shape[1], k.shape[1]), heads)
    if k.shape[1] == 0:
        fail("k", f"shape {tuple(k.shape)}", "at least one token", "a softmax over nothing is undefined")
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        fail("scale", scale, "a positive number", "negate q for a negative scale")
    kernel = runs_kernel(q)
    if kernel:
        check_kernel_dtype("q", q)
        if head_dim % 8 or not 16 <= head_dim <= 128:
            remedy = "pad it with zeros, or use force_route(Route.REFERENCE)"
            fail("q", f"head dim {head_dim}", "a multiple of 8 from 16 to 128", remedy)
    return scale, kernel


@functools.cache  # once
def _warn(tokens: int, heads: int) -> None:
    warnings.warn(
        f"attention: got {tokens} tokens of {heads} heads, wanted (B, tokens, heads, D) as flash-attention has them; "
        "if these are (B, heads, tokens, D), transpose(1, 2) them and the result",
        stacklevel=4,
    )


@torch.library.custom_op("meanflow_kernels::attention", mutates_args=())
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check_interpreted("q", q)
    return attention_forward(q, k, v, scale, FORWARD)


@_attention_op.register_fake
def _(q, k, v, scale):
    return empty_outputs(q)


@torch.library.custom_op("meanflow_kernels::attention_jvp", mutates_args=())
def _attention_jvp_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
    tangent_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The samples with a tangent run the dual kernel, those before and after it the plain one, all into one o."""
    check_interpreted("q", q)
    primals = aligned(q), aligned(k), aligned(v)
    tangents = tuple(None if x is None else aligned(x) for x in (q_dot, k_dot, v_dot))
    n = next(x.shape[0] for x in tangents if x is not None)
    o, lse = empty_outputs(q)
    o_dot = q.new_empty((n, *q.shape[1:]))
    config = dual_config(arch_of(q.device), q.dtype, q.shape[-1], q.shape[1])
    rows = slice(tangent_start, tangent_start + n)
    forward_launch(tuple(x[rows] for x in primals), tangents, (o[rows], o_dot, lse[rows]), scale, config).run()
    for rows in (slice(0, tangent_start), slice(tangent_start + n, q.shape[0])):
        if rows.start < rows.stop:
            attention_forward(*(x[rows] for x in primals), scale, BESIDE, (o[rows], lse[rows]))
    return o, o_dot, lse


@_attention_jvp_op.register_fake
def _(q, k, v, q_dot, k_dot, v_dot, scale, tangent_start):
    o, lse = empty_outputs(q)
    n = next(x.shape[0] for x in (q_dot, k_dot, v_dot) if x is not None)
    return o, q.new_empty((n, *q.shape[1:])), lse


@torch.library.custom_op("meanflow_kernels::attention_bwd", mutates_args=())
def _attention_bwd_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(do, q, k, v, o, lse, scale)


@_attention_bwd_op.register_fake
def _(do, q, k, v, o, lse, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_primals(ctx, q, k, v, o, lse, scale):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.scale = scale


def _setup_context(ctx, inputs, output):
    q, k, v, scale = inputs
    _save_primals(ctx, q, k, v, *output, scale)


def _setup_context_jvp(ctx, inputs, output):
    q, k, v, _, _, _, scale, _ = inputs
    o, _, lse = output
    _save_primals(ctx, q, k, v, o, lse, scale)


def _primal_gradients(ctx, do, dlse):
    if dlse is not None:
        raise RuntimeError(
            "a gradient was asked for through attention's lse, which is returned for inspection: detach it"
        )
    if do is None:
        return None, None, None
    return last(*torch.ops.meanflow_kernels.attention_bwd(do, *ctx.saved_tensors, ctx.scale))


def _backward(ctx, do, dlse):
    return *_primal_gradients(ctx, do, dlse), None


def _backward_jvp(ctx, do, do_dot, dlse):
    refuse_tangent_gradient(do_dot)
    return *_primal_gradients(ctx, do, dlse), None, None, None, None, None


_attention_op.register_autograd(_backward, setup_context=_setup_context)
_attention_jvp_op.register_autograd(_backward_jvp, setup_context=_setup_context_jvp)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Non-causal softmax attention, differentiable in reverse mode, and in forward mode through :func:`attention_jvp`.

    Args:
        q: (B, M, H, D).
        k, v: (B, N, H, D). Any strides; slices of a packed (B, L, 3, H, D) projection are read in place. Only what
            16-byte loads cannot reach (columns apart, or a start or stride off the 16-byte grid) is copied once.
        scale: of the scores, positive; D ** -0.5 by default.

    All of one dtype and device. The kernel takes bf16, fp16 and fp32 (in IEEE arithmetic, not TF32) and D from 16 to
    128 in multiples of 8; the reference also fp64 and any D. Tokens come before heads: fewer tokens than heads look
    like (B, H, L, D) and are warned of.

    Returns:
        o (B, M, H, D), contiguous: ``o.flatten(2)`` feeds the next linear layer. Both routes carry one forward-mode
        level, innermost (torch.func.jvp, jacfwd, forward_ad), and one backward of o.

    Raises:
        ValueError: a shape, dtype, device, head dim or scale outside the above.
        RuntimeError: other transforms of torch.func around the call, or a second derivative of o.
    """
    scale, kernel = _check(q, k, v, scale)
    (q, k, v), tangents = unpack(q, k, v)
    if not absent(tangents):
        return pack(*attention_jvp((q, k, v), tangents, scale=scale))
    if not kernel:
        return attention_ref(*once(q, k, v), scale=scale)[0]
    return torch.ops.meanflow_kernels.attention(q, k, v, scale)[0]


def attention_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    scale: float | None = None,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attention` and its tangent in one pass; the primal is differentiable, the tangent is not.

    Args:
        primals: (q, k, v) as for :func:`attention`.
        tangents: (q_dot, k_dot, v_dot), each None (structurally zero, and then it costs nothing) or shaped like its
            primal but for the batch, in its dtype.
        scale: as for :func:`attention`.
        tangent_start: the tangents belong to samples tangent_start, tangent_start + 1, ... of the batch; None: to all.

    Returns:
        o (B, M, H, D) and o_dot, (n, M, H, D) for n tangent samples; None where all tangents are None. Both contiguous.

    Raises:
        ValueError: as :func:`attention`, or a tangent that does not match its primal.
        TangentGradientError: from backward, where a gradient reaches o_dot.
    """
    if absent(tangents):
        return attention(*primals, scale=scale), None
    q, k, v = primals
    scale, kernel = _check(q, k, v, scale)
    start, _ = check_tangents(_NAMES, primals, tangents, tangent_start)
    if kernel:
        o, o_dot, _ = torch.ops.meanflow_kernels.attention_jvp(q, k, v, *tangents, scale, start)
        return o, o_dot
    o, _ = attention_ref(*once(q, k, v), scale=scale)
    with torch.no_grad():
        o_dot = attention_tangent_ref(tangent_rows(primals, tangents, tangent_start), tangents, scale=scale)
    return o, guard(o_dot, *primals, *tangents)
