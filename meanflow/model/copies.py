"""Low-precision copies of weights, which an optimizer keeps for the matrix products, and the gradients of such weights.

A weight's gradient is a product in low precision. What sums gradients, over processes or micro-batches, does so in
fp32, and each product is cast to it. In one process without accumulation nothing is summed: there the product itself is
``p.grad`` (`keep_products`), for the optimizer and the norm to read, whose numbers stay the same to the last bit. Then
hooks on such a weight see low precision too, and torch's own clip_grad_norm_ would round each weight's norm to it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Copies(torch.autograd.Function):
    """Replace weights by their copies; gradients go to the weights, and autograd casts them to their ``grad_dtype``."""

    @staticmethod
    def forward(*pairs):
        return tuple(copy.detach() for copy in pairs[1::2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return tuple(x for grad in grads for x in (grad, None))


class _Copy(_Copies):
    """The same for a single pair: the compiler needs forward's parameters by number."""

    @staticmethod
    def forward(weight, copy):
        return copy.detach()


def by_copy(weight: Tensor, copy: Tensor) -> Tensor:
    """Return the copy; its gradient goes to the weight."""
    return copy if copy.requires_grad else _Copy.apply(weight, copy)


def keep_products(params: Sequence[Tensor], copies: Sequence[Tensor | None]) -> None:
    """Keep the gradients of parameters with a copy in the copy's dtype; for gradients that are never summed."""
    for p, copy in zip(params, copies, strict=True):
        if copy is not None:
            p.grad_dtype = copy.dtype


def product_layers(net: nn.Module) -> list[nn.Module]:
    """The layers whose weights keep their gradients in the copy's dtype (`keep_products`)."""
    return [m for m in net.modules() if getattr(m, "copy", None) is not None and m.weight.grad_dtype == m.copy.dtype]


@contextmanager
def products_kept(layers: list[nn.Module]) -> Iterator[None]:
    """Keep gradients as products through a forward and backward pass of compiled layers.

    A compiled graph would cast them to the weights' dtype; autograd's node from weights to copies is therefore made
    outside of the graph, here.
    """
    kept = [layer.copy for layer in layers]
    try:
        if layers:
            outside = _Copies.apply(*(x for layer in layers for x in (layer.weight, layer.copy)))
            for layer, copy in zip(layers, outside, strict=True):
                layer.copy = copy
        yield
    finally:
        for layer, copy in zip(layers, kept, strict=True):
            layer.copy = copy
