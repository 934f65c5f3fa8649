"""Tensors with their tangents, as the network's layers pass them on."""

from typing import NamedTuple

import torch
from torch import Tensor


class Dual(NamedTuple):
    """A tensor and its tangent, which may be absent, or belong to the samples from ``start`` on only."""

    primal: Tensor
    tangent: Tensor | None = None
    start: int | None = None

    def map(self, f) -> "Dual":
        """The same linear rearrangement of both."""
        return self._replace(primal=f(self.primal), tangent=None if self.tangent is None else f(self.tangent))

    def to(self, dtype: torch.dtype) -> "Dual":
        """Both in another dtype."""
        return self.map(lambda x: x.to(dtype))

    def split(self, parts: int) -> list["Dual"]:
        """Both cut into equal parts along the last dimension."""
        tangents = [None] * parts if self.tangent is None else self.tangent.chunk(parts, -1)
        return [Dual(x, x_dot, self.start) for x, x_dot in zip(self.primal.chunk(parts, -1), tangents, strict=True)]

    def __add__(self, other: "Dual") -> "Dual":
        if self.tangent is None or other.tangent is None:
            tangent = self.tangent if other.tangent is None else other.tangent
        else:
            tangent = self.tangent + other.tangent
        start = self.start if other.start is None else other.start
        return Dual(self.primal + other.primal, tangent, start)


def apply_dual(op_jvp, *duals: Dual, **options):
    """Apply an operator on explicit pairs to `Dual`s."""
    start = next((x.start for x in duals if x.tangent is not None), None)
    if start is not None:
        options["tangent_start"] = start
    out, out_dot = op_jvp(tuple(x.primal for x in duals), tuple(x.tangent for x in duals), **options)
    if isinstance(out, tuple):
        return tuple(dual(y, y_dot, start) for y, y_dot in zip(out, out_dot, strict=True))
    return dual(out, out_dot, start)


def dual(x: Tensor, x_dot: Tensor | None, start: int | None) -> Dual:
    # detached, so that what wraps a block (a checkpoint, FSDP) finds nothing to differentiate in the tangent
    return Dual(x, None if x_dot is None else x_dot.detach(), start)
