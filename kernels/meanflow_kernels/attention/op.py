"""Softmax attention on (primal, tangent) pairs: checks, registration and the public functions.

Each exists twice: on (q, k, v), and on (qkv,), a packed projection, whose gradient is one tensor that the backward
fills with the parts of q, k and v. Primals and tangents are tuples of either kind here.
"""

import functools
import math
import warnings

import torch
from torch import Tensor

from ..checks import (
    check_alike,
    check_interpreted,
    check_kernel_dtype,
    check_parameter,
    check_real,
    check_shape,
    check_tangents,
    fail,
)
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import Launch, arch_of
from ..plans import run
from ..registration import custom_op, differentiate
from ..routing import runs_kernel
from ..transforms import tracked
from .backends import attention_backward, attention_forward, attention_qkv_backward, empty_outputs
from .config import BESIDE, FORWARD, dual_config
from .launches import aligned, forward_launch
from .reference import attention_ref, attention_tangent_ref

_NAMES = {3: ("q", "k", "v"), 1: ("qkv",)}
"""By the number of inputs."""


def _split(inputs: tuple) -> tuple:
    """q, k and v, of which those of a packed projection are views."""
    return inputs[0].unbind(2) if len(inputs) == 1 else inputs


@once_a_kind
def _check(
    primals: tuple, bias: Tensor | None, tangents: tuple = (), *, scale: float | None, tangent_start: int | None = None
) -> tuple[float, bool, int]:
    """Shapes, dtypes and devices; returns the scale, whether the kernel runs, and where the tangents begin."""
    names, first = _NAMES[len(primals)], primals[0]
    if len(primals) == 1:
        check_shape("qkv", first, (None, None, 3, None, None), "(B, L, 3, H, D)")
        if bias is not None:
            check_shape("bias", bias, (math.prod(first.shape[2:]),), "(3 H D,)")
            check_alike(("qkv", "bias"), (first, bias), dtype=False)
            check_real("bias", bias)
            if runs_kernel(first):
                check_kernel_dtype("bias", bias)
    else:
        check_shape("q", first, (None, None, None, None), "(B, M, H, D)")
        check_shape("k", primals[1], (first.shape[0], None, *first.shape[2:]), "(B, N, H, D)")
        check_shape("v", primals[2], tuple(primals[1].shape), "(B, N, H, D)")
        check_alike(names, primals)
    name, keys = names[0], names[len(names) // 2]
    check_real(name, first)
    tokens, heads, head_dim = primals[-1].shape[1], *first.shape[-2:]
    longest = max(tokens, first.shape[1])
    if not torch.compiler.is_compiling() and longest < heads:
        _warn(longest, heads)
    if tokens == 0:
        fail(keys, f"shape {tuple(primals[-1].shape)}", "at least one token", "a softmax over nothing is undefined")
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        fail("scale", scale, "a positive number", "negate q for a negative scale")
    kernel = runs_kernel(first)
    if kernel:
        check_kernel_dtype(name, first)
        if head_dim % 8 or not 16 <= head_dim <= 128:
            remedy = "pad it with zeros, or use force_route(Route.REFERENCE)"
            fail(name, f"head dim {head_dim}", "a multiple of 8 from 16 to 128", remedy)
    if bias is not None and tangents:
        check_parameter("bias", bias)
    return scale, kernel, check_tangents(names, primals, tangents, tangent_start)[0]


@functools.cache  # once
def _warn(tokens: int, heads: int) -> None:
    warnings.warn(
        f"attention: got {tokens} tokens of {heads} heads, wanted (B, tokens, heads, D) as flash-attention has them; "
        "if these are (B, heads, tokens, D), transpose(1, 2) them and the result",
        stacklevel=6,
    )


def _dual_launch(primals: tuple, tangents: tuple, outputs: tuple, scale: float) -> Launch:
    q = primals[0]
    every = all(x is not None for x in tangents)
    config = dual_config(arch_of(q.device), q.dtype, q.shape[-1], q.shape[1], every=every)
    primals, tangents = (tuple(None if x is None else aligned(x) for x in xs) for xs in (primals, tangents))
    return forward_launch(primals, tangents, outputs, scale, config)


def _run_dual(primals: tuple, tangents: tuple, scale: float, tangent_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """The samples with a tangent run the dual kernel, those before and after it the plain one, all into one o."""
    primals, tangents = _split(primals), _split(tangents)
    q = primals[0]
    check_interpreted("q", q)
    o, lse, o_dot = _empty_dual(q, tangents)
    n = o_dot.shape[0]
    if n == q.shape[0]:
        run(_dual_launch, primals, tangents, (o, o_dot, lse), scale)
        return o, lse, o_dot
    rows = slice(tangent_start, tangent_start + n)
    run(_dual_launch, tuple(x[rows] for x in primals), tangents, (o[rows], o_dot, lse[rows]), scale)
    for rows in (slice(0, tangent_start), slice(tangent_start + n, q.shape[0])):
        if rows.start < rows.stop:
            q_, k_, v_ = (x[rows] for x in primals)
            attention_forward(q_, k_, v_, scale, BESIDE, (o[rows], lse[rows]))
    return o, lse, o_dot


def _empty_dual(q: Tensor, tangents: tuple) -> tuple[Tensor, Tensor, Tensor]:
    o, lse = empty_outputs(q)
    n = next(x.shape[0] for x in tangents if x is not None)
    return o, lse, q.new_empty((n, *q.shape[1:]))


@custom_op("meanflow_kernels::attention")
def _attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check_interpreted("q", q)
    return attention_forward(q, k, v, scale, FORWARD)


@_attention_op.register_fake
def _(q, k, v, scale):
    return empty_outputs(q)


@custom_op("meanflow_kernels::attention_jvp")
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
    return _run_dual((q, k, v), (q_dot, k_dot, v_dot), scale, tangent_start)


@_attention_jvp_op.register_fake
def _(q, k, v, q_dot, k_dot, v_dot, scale, tangent_start):
    return _empty_dual(q, (q_dot, k_dot, v_dot))


@custom_op("meanflow_kernels::attention_bwd")
def _attention_bwd_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(do, q, k, v, o, lse, scale)


@_attention_bwd_op.register_fake
def _(do, q, k, v, o, lse, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@custom_op("meanflow_kernels::attention_qkv")
def _attention_qkv_op(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    check_interpreted("qkv", qkv)
    q, k, v = qkv.unbind(2)
    return attention_forward(q, k, v, scale, FORWARD)


@_attention_qkv_op.register_fake
def _(qkv, bias, scale):
    return empty_outputs(qkv[:, :, 0])


@custom_op("meanflow_kernels::attention_qkv_jvp")
def _attention_qkv_jvp_op(
    qkv: Tensor, bias: Tensor | None, qkv_dot: Tensor, scale: float, tangent_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _run_dual((qkv,), (qkv_dot,), scale, tangent_start)


@_attention_qkv_jvp_op.register_fake
def _(qkv, bias, qkv_dot, scale, tangent_start):
    return _empty_dual(qkv[:, :, 0], (qkv_dot,))


@custom_op("meanflow_kernels::attention_qkv_bwd")
def _attention_qkv_bwd_op(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    dqkv, dbias = _packed_gradients(qkv, bias_dtype)
    attention_qkv_backward(do, qkv, o, lse, scale, dqkv, None if bias_dtype is None else dbias)
    return dqkv, dbias


def _packed_gradients(qkv: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Room for dqkv and dbias, which is empty where there is none."""
    width = 0 if bias_dtype is None else math.prod(qkv.shape[2:])
    return qkv.new_empty(qkv.shape), qkv.new_empty(width, dtype=bias_dtype)


@_attention_qkv_bwd_op.register_fake
def _(do, qkv, o, lse, scale, bias_dtype):
    return _packed_gradients(qkv, bias_dtype)


def _keep(operands, outputs):
    return (*operands[:3], *outputs[:2]), [x for x in operands if isinstance(x, float)]


def _backward(q, k, v, o, lse, do, dlse, scale):
    _refuse(dlse)
    return _attention_bwd_op(do, q, k, v, o, lse, scale)


def _keep_packed(operands, outputs):
    (scale,), bias = [x for x in operands if isinstance(x, float)], operands[1]
    return (operands[0], *outputs[:2]), (scale, bias.dtype if bias is not None and bias.requires_grad else None)


def _backward_packed(qkv, o, lse, do, dlse, scale, bias_dtype):
    _refuse(dlse)
    dqkv, dbias = _attention_qkv_bwd_op(do, qkv, o, lse, scale, bias_dtype)
    return dqkv, None if bias_dtype is None else dbias


def _refuse(dlse: Tensor | None) -> None:
    if dlse is not None:
        raise RuntimeError(
            "a gradient was asked for through attention's lse, which is returned for inspection: detach it"
        )


differentiate(_attention_op, _attention_jvp_op, keep=_keep, backward=_backward, results=2)
differentiate(_attention_qkv_op, _attention_qkv_jvp_op, keep=_keep_packed, backward=_backward_packed, results=2)


class _Contained(torch.autograd.Function):
    """qkv itself; a bias that it contains gets the sum of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(qkv, bias):
        return qkv.view_as(qkv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.bias_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, dqkv):
        return dqkv, dqkv.sum((0, 1), dtype=ctx.bias_dtype).flatten()


def _reference(primals: tuple, bias: Tensor | None, scale: float) -> Tensor:
    if bias is None or not torch.is_grad_enabled() or not tracked(bias):
        return attention_ref(*_split(once(*primals)), scale=scale)[0]
    return attention_ref(*_Contained.apply(*once(*primals, bias)).unbind(2), scale=scale)[0]


def _attend(primals: tuple, bias: Tensor | None, scale: float | None) -> Tensor:
    scale, kernel, _ = _check(primals, bias, scale=scale)
    (*inputs, bias), (*tangents, bias_dot) = unpack(*primals, bias)
    primals = tuple(inputs)
    if bias_dot is not None:
        # it moves qkv as a tangent of qkv does
        bias_dot = bias_dot.to(primals[0].dtype).view(primals[0].shape[2:])
        tangents[0] = bias_dot.expand_as(primals[0]) if tangents[0] is None else tangents[0] + bias_dot
    if not absent(tuple(tangents)):
        return pack(*_attend_dual(primals, tuple(tangents), bias, scale, None))
    if not kernel:
        return _reference(primals, bias, scale)
    return _attention_qkv_op(*primals, bias, scale)[0] if len(primals) == 1 else _attention_op(*primals, scale)[0]


def _attend_dual(
    primals: tuple, tangents: tuple, bias: Tensor | None, scale: float | None, tangent_start: int | None
) -> tuple[Tensor, Tensor | None]:
    if absent(tangents):
        return _attend(primals, bias, scale), None
    scale, kernel, tangent_start = _check(primals, bias, tangents, scale=scale, tangent_start=tangent_start)
    if kernel and len(primals) == 1:
        return _attention_qkv_jvp_op(*primals, bias, *tangents, scale, tangent_start)[::2]
    if kernel:
        return _attention_jvp_op(*primals, *tangents, scale, tangent_start)[::2]
    o = _reference(primals, bias, scale)
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        o_dot = attention_tangent_ref(_split(rows), _split(tangents), scale=scale)
    return o, forbid_gradient(o_dot, *primals, *tangents, bias)


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
    return _attend((q, k, v), None, scale)


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
    q, k, v = primals
    return _attend_dual((q, k, v), tangents, None, scale, tangent_start)


def attention_qkv(qkv: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """:func:`attention` of a packed projection: the same numbers, and a gradient that is one tensor too.

    The backward writes the gradients of q, k and v side by side, where torch would put three tensors together. (A
    library's backward makes three, which one kernel packs.)

    Args:
        qkv: (B, L, 3, H, D), read in place as q, k and v are. scale: as for :func:`attention`.
        bias: (3 H D,), of any dtype, or None: the projection's, which qkv contains already and without a gradient
            (``linear(x, weight, bias.detach())``). It is not read. Its gradient comes from here, summed in the pass
            that makes qkv's, which is not read again.

    Returns:
        o (B, L, H, D), contiguous.

    Raises:
        ValueError: as :func:`attention`.
    """
    return _attend((qkv,), bias, scale)


def attention_qkv_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`attention_qkv` and its tangent in one pass: :func:`attention_jvp` of (qkv,) and (qkv_dot,).

    Args:
        primals: qkv (B, L, 3, H, D).
        tangents: qkv_dot, shaped like qkv but for the batch, or None.
        bias: as for :func:`attention_qkv`; a parameter: it has no tangent.
        scale, tangent_start: as for :func:`attention_jvp`.

    Returns:
        o (B, L, H, D) and o_dot, (n, L, H, D) for n tangent samples, or None. Both contiguous.

    Raises:
        ValueError: as :func:`attention`, or a tangent that does not match.
        TangentGradientError: from backward, where a gradient reaches o_dot.
    """
    (qkv,) = primals
    return _attend_dual((qkv,), tangents, bias, scale, tangent_start)
