"""What is decided once for all calls of a kind, which differ in nothing that the decision looks at."""

import functools
from collections.abc import Callable, Iterable
from types import NoneType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .routing import forced
from .transforms import may_be_dual

P = ParamSpec("P")
T = TypeVar("T")
MOST_KINDS = 4096
"""Kinds that are remembered; one more, and all are forgotten."""
_CONSTANT = (NoneType, int, float, str, torch.dtype)
_passed: dict[tuple, Any] = {}


def remember(known: dict[tuple, Any], kind: tuple, decision: Any) -> None:
    """Keep what was decided for the calls of a kind."""
    if len(known) >= MOST_KINDS:
        known.clear()
    known[kind] = decision


def once_a_kind(check: Callable[P, T]) -> Callable[P, T]:
    """Let a check see the first call of a kind alone; later ones get what it returned. What it refuses it sees again.

    Its positional arguments are tensors, None and tuples of those, of which it looks at shapes, dtypes and devices
    alone; its keyword arguments are values. It may look at the forced route too. Where it looks at more, it sees every
    call: under torch.compile, in forward-mode AD, under the transforms of torch.func.
    """

    @functools.wraps(check)
    def checked(*tensors: P.args, **values: P.kwargs) -> T:
        if may_be_dual() or torch._C._are_functorch_transforms_active():
            return check(*tensors, **values)
        kind: list = [check, forced.route]
        _describe(tensors, kind)
        for name, value in values.items():
            kind += (name, value.__class__, value)
        key = tuple(kind)
        try:
            if key in _passed:
                return _passed[key]
        except TypeError:
            # of something that has no hash nothing is kept
            return check(*tensors, **values)
        found = check(*tensors, **values)
        # the value of a tensor may change
        if all(isinstance(value, _CONSTANT) for value in values.values()):
            remember(_passed, key, found)
        return found

    return checked


def _describe(tensors: Iterable, kind: list) -> None:
    for x in tensors:
        if isinstance(x, Tensor):
            kind += (x.shape, x.dtype, x.device)
        elif isinstance(x, (tuple, list)):
            kind.append(len(x))
            _describe(x, kind)
        else:
            kind += (x.__class__, x)
