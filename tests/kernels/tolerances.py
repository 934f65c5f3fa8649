"""The error bar of every kernel test: at most twice plain torch's error in the same dtype, plus a floor.

Errors are against fp64 on the same rounded inputs, in two norms: the relative Frobenius norm sees a small error of all
elements, the largest absolute error a large one of a few among millions.
"""

import math

import torch
from torch import Tensor

from benchmarks.harness.errors import FLOOR, relative_error


def largest_error(x: Tensor, exact: Tensor) -> float:
    """The largest |x - exact| of an element."""
    return (x.double() - exact.double()).abs().max().item()


def last_place(exact: Tensor, dtype: torch.dtype) -> float:
    """The unit in the last place of the largest element, in ``dtype``."""
    _, exponent = math.frexp(exact.abs().max().item())
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)


def assert_error(x: Tensor, exact: Tensor, plain: Tensor | tuple[Tensor, ...], name: str) -> None:
    """``x`` is at most twice as far from ``exact`` as ``plain`` (the same quantity by plain torch in x's dtype; where
    there are several ways to write it, by the least exact one), plus FLOOR in the Frobenius norm, and plus two units in
    the last place of the largest element in the largest error.
    """
    plains = plain if isinstance(plain, tuple) else (plain,)
    assert all(x.dtype == y.dtype for y in plains) and x.shape == exact.shape, f"{name}: {x.dtype} {tuple(x.shape)}"
    for norm, floor in ((relative_error, FLOOR[x.dtype]), (largest_error, 2 * last_place(exact, x.dtype))):
        error, bar = norm(x, exact), 2 * max(norm(y, exact) for y in plains) + floor
        assert error <= bar, f"{name}: {norm.__name__} {error:.2e} > {bar:.2e}"
