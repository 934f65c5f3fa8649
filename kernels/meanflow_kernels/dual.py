"""The explicit (primal, tangent) pair: which samples carry a tangent, and that nothing differentiates it."""

from torch import Tensor


def tangent_rows(primals: tuple, tangents: tuple, start: int | None) -> tuple:
    """The detached slice of each primal that the tangents belong to: samples ``start`` to ``start + n``.

    ``start=None`` says that the tangents cover the whole batch.
    """
    n = next(x.shape[0] for x in tangents if x is not None)
    start = 0 if start is None else start
    return tuple(x.detach()[start : start + n] for x in primals)


def absent(tangents: tuple[Tensor | None, ...]) -> bool:
    """Whether every tangent is structurally zero."""
    return all(x is None for x in tangents)
