"""Low-precision copies of parameters, which an optimizer keeps for the matrix products, and the gradients of those.

A weight's gradient is a product in low precision. What sums gradients, over processes or micro-batches, does so in
fp32, and each product is cast to it. In one process without accumulation nothing is summed: there the product itself is
``p.grad`` (`keep_products`), for the optimizer and the norm to read, whose numbers stay the same to the last bit. Then
hooks on such a weight see low precision too, and torch's own clip_grad_norm_ would round each weight's norm to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """A low-precision copy, a buffer of a module, and the parameters whose rows it holds, one below the other."""

    module: nn.Module
    name: str
    params: tuple[Tensor, ...]

    @property
    def copy(self) -> Tensor:
        return getattr(self.module, self.name)


class _Copies(torch.autograd.Function):
    """Replace parameters by their copies; gradients go to the parameters, and autograd casts them to ``grad_dtype``."""

    @staticmethod
    def forward(counts, *tensors):
        # the copies, then each one's parameters
        return tuple(copy.detach() for copy in tensors[: len(counts)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        counts, *tensors = inputs
        rows = iter([len(p) for p in tensors[len(counts) :]])
        ctx.rows = [[next(rows) for _ in range(count)] for count in counts]

    @staticmethod
    def backward(ctx, *grads):
        found = []
        for grad, rows in zip(grads, ctx.rows, strict=True):
            found += [None] * len(rows) if grad is None else [grad] if len(rows) == 1 else grad.split(rows)
        return (None, *[None] * len(grads), *found)


class _Copy(torch.autograd.Function):
    """The same for one parameter: the compiler needs forward's arguments by number."""

    @staticmethod
    def forward(p, copy):
        return copy.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def by_copy(p: Tensor, copy: Tensor) -> Tensor:
    """Return the copy; its gradient goes to the parameter."""
    return copy if copy.requires_grad else _Copy.apply(p, copy)


def keep_products(params: Sequence[Tensor], copies: Sequence[Tensor | None]) -> None:
    """Keep the gradients of parameters with a copy in the copy's dtype; for gradients that are never summed."""
    for p, copy in zip(params, copies, strict=True):
        if copy is not None:
            p.grad_dtype = copy.dtype


def keep_copies(net: nn.Module) -> dict[Tensor, Tensor]:
    """Make the copies that a network's layers read in its compute_dtype, by parameter; none if that is its dtype."""
    if net.compute_dtype in (None, net.dtype):
        return {}
    layers = [m for m in net.modules() if hasattr(m, "keep_copies")]
    return {p: copy for layer in layers for p, copy in layer.keep_copies(net.compute_dtype).items()}


def kept_copies(net: nn.Module) -> list[Kept]:
    """All copies that a network keeps."""
    return [kept for m in net.modules() if hasattr(m, "kept_copies") for kept in m.kept_copies()]


def product_copies(net: nn.Module) -> list[Kept]:
    """The copies whose parameters keep their gradients in the copy's dtype (`keep_products`)."""
    return [kept for kept in kept_copies(net) if all(p.grad_dtype == kept.copy.dtype for p in kept.params)]


@contextmanager
def products_kept(copies: list[Kept]) -> Iterator[None]:
    """Keep gradients as products through a forward and backward pass of compiled layers.

    A compiled graph would cast them to the parameters' dtype; autograd's node from parameters to copies is therefore
    made outside of the graph, here.
    """
    buffers = [kept.copy for kept in copies]
    try:
        if copies:
            params = [p for kept in copies for p in kept.params]
            outside = _Copies.apply(tuple(len(kept.params) for kept in copies), *buffers, *params)
            for kept, copy in zip(copies, outside, strict=True):
                setattr(kept.module, kept.name, copy)
        yield
    finally:
        for kept, copy in zip(copies, buffers, strict=True):
            setattr(kept.module, kept.name, copy)
