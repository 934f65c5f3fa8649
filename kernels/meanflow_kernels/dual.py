"""The two doors to a dual operator; no gradient flows through its tangent, and none through its gradient.

The first door is the explicit pair, ``op_jvp(primals, tangents)``. The second is forward-mode AD (``torch.func.jvp`` or
``torch.autograd.forward_ad``): the plain ``op`` unpacks dual inputs, calls the explicit pair, and packs the results
again. A registered operator alone drops the tangent silently. So does torch.compile when a dual tensor is passed in:
call torch.func.jvp inside the compiled function.

Both routes tell the same: the primal is differentiable once, the tangent not at all.

How an op uses this module:

    def silu(x):
        kernel, _ = _check(x)
        (x,), tangents = unpack(x)
        if not absent(tangents):
            return pack(*silu_jvp((x,), tangents))
        if not kernel:
            return silu_ref(*once(x))
        return _silu(x)  # its backward ends with last(dx)

    def silu_jvp(primals, tangents, *, tangent_start=None):
        if absent(tangents):
            return silu(*primals), None
        (x,), (x_dot,) = primals, tangents
        kernel, tangent_start = _check(x, tangents, tangent_start=tangent_start)
        if kernel:
            return _silu_jvp(x, x_dot, tangent_start)  # its backward starts with refuse_tangent_gradient(dy_dot)
        with torch.no_grad():
            y_dot = silu_tangent_ref(...)
        return silu_ref(*once(x)), forbid_gradient(y_dot, *primals, *tangents)

The registered op calls ``ctx.set_materialize_grads(False)`` in its setup_context, so that an unused tangent's
cotangent is None.
"""

from typing import Any, TypeVarTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .transforms import may_be_dual, tracked

Inputs = TypeVarTuple("Inputs")

REFUSAL = (
    "a gradient was asked for through a tangent: the *_jvp operators differentiate their primal result only. "
    "Detach the tangent before it enters the loss (x_dot.detach()), and before it leaves a compiled region."
)


class TangentGradientError(RuntimeError):
    """Reverse-mode differentiation reached the tangent output of a dual operator."""

    def __init__(self):
        super().__init__(REFUSAL)


def refuse_tangent_gradient(*cotangents: Tensor | None) -> None:
    """Raise :class:`TangentGradientError` unless every cotangent of a tangent output is None.

    The first line of a dual op's registered backward; that needs ``ctx.set_materialize_grads(False)`` in setup_context.
    """
    if any(g is not None for g in cotangents):
        raise TangentGradientError


class _ForbidGradient(torch.autograd.Function):
    """Identity on a tangent computed under no_grad; a gradient that comes back through it raises."""

    @staticmethod
    def forward(x_dot, *anchors):
        return x_dot.view_as(x_dot)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.n_inputs = len(inputs)

    @staticmethod
    def backward(ctx, g):
        refuse_tangent_gradient(g)
        return (None,) * ctx.n_inputs


@torch.compiler.allow_in_graph
def _forbid_gradient(x_dot, *anchors):
    # Dynamo would trace the raising backward whether or not anything reaches it; AOTAutograd traces it only when
    # something does
    return _ForbidGradient.apply(x_dot, *anchors)


def forbid_gradient(x_dot: Tensor, *inputs: Tensor | None) -> Tensor:
    """``x_dot``, computed under no_grad from ``inputs``, as a tensor through which a gradient raises, not vanishes.

    A view, not a copy; ``x_dot`` itself where no gradient is recorded. ``inputs`` are all tensors the tangent depends
    on (primals, tangents, weights; None is ignored). Compiled, a tangent that is detached or consumed inside the
    region costs nothing, and one returned while it requires grad raises :class:`TangentGradientError` when the region
    is compiled.
    """
    anchors = [x for x in inputs if x is not None and tracked(x)]
    return _forbid_gradient(x_dot, *anchors) if torch.is_grad_enabled() and anchors else x_dot


SECOND = (
    "a second derivative was asked for through an operator's gradient (create_graph=True), which is differentiable "
    "once. Use the *_ref function of the operator's reference.py, plain torch, which carries any"
)


class _Last(torch.autograd.Function):
    """Identity on gradients; a gradient of theirs raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*grads):
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(SECOND)


class _Once(torch.autograd.Function):
    """Identity on the inputs of a reference, whose gradients are the last."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return tuple(None if x is None else x.view_as(x) for x in inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return last(*grads)


def last(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's inputs, through which a second derivative raises."""
    return _Last.apply(*grads) if torch.is_grad_enabled() else grads


def once(*inputs: *Inputs) -> tuple[*Inputs]:
    """The inputs of a reference that is differentiable once, as its kernel is. A compiled one is so by itself."""
    if torch.compiler.is_compiling() or not (
        torch.is_grad_enabled() and any(x is not None and tracked(x) for x in inputs)
    ):
        return inputs
    return _Once.apply(*inputs)


def unpack(*inputs: *Inputs) -> tuple[tuple[*Inputs], tuple[Tensor | None, ...]]:
    """Primals and tangents of inputs that may be forward-mode duals; tangents are None where structurally zero.

    Outside forward-mode AD the inputs come back as they are, with no tangents. Tangents come in their primal's dtype:
    torch makes that of a zero-dim dual times a number fp64.
    """
    if not may_be_dual():
        return inputs, (None,) * len(inputs)
    pairs = [(None, None) if x is None else forward_ad.unpack_dual(x) for x in inputs]
    primals: Any = tuple(x for x, _ in pairs)
    return primals, tuple(None if x_dot is None else x_dot.to(x.dtype) for x, x_dot in pairs)


def pack(x: Tensor, x_dot: Tensor | None) -> Tensor:
    """The dual tensor of a primal and its tangent at the current level; ``x`` where the tangent is None."""
    return x if x_dot is None else forward_ad.make_dual(x, x_dot)


def absent(tangents: tuple[Tensor | None, ...]) -> bool:
    """Whether every tangent is structurally zero."""
    return all(x is None for x in tangents)


def tangent_rows(primals: tuple[*Inputs], tangents: tuple, start: int | None) -> tuple[*Inputs]:
    """The detached slice of each primal that the tangents belong to: samples ``start`` to ``start + n``.

    ``start=None`` says that the tangents cover the whole batch. Check first: ``checks.check_tangents``.
    """
    n = next(x.shape[0] for x in tangents if x is not None)
    start = 0 if start is None else start
    rows: Any = tuple(x.detach()[start : start + n] for x in primals)
    return rows
