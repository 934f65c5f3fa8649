"""Launches decided once: a call like an earlier one passes addresses to kernels that are compiled and bound already.

All of a launch but the addresses of its tensors follows from the shapes, strides, dtypes, device and values of what it
is built from. To build, bind and specialise it takes the host longer than many a kernel runs.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kinds import remember
from .launch import Launch

_SIXTEEN_BYTES = 16
_REPLAYED = ("run", "function", "packed_metadata")
"""What is used of a compiled kernel."""


class _Plan(NamedTuple):
    """What a kind of calls launches."""

    launches: tuple[tuple[Callable, Callable], ...]
    """a kernel on its grid, and what picks its arguments out of the call's addresses and the plan's constants"""
    constants: tuple
    scratch: tuple[tuple[int, ...], torch.dtype] | None
    driver: Any
    """Triton's: it knows the current device and stream"""
    runtime: Any
    """Triton's settings: a profiler sets its hooks there"""


_plans: dict[tuple, _Plan] = {}


def run(build: Callable[..., Launch | Iterable[Launch]], *operands: Any) -> None:
    """Run what ``build(*operands)`` launches, in order, on the device of the first tensor.

    It is built in the first call of a kind. Later ones launch by their plan, but for those whose tensors do not all
    start on 16-byte boundaries, as the kernels were specialised to, and those that a profiler's hooks watch. In the
    interpreter every call is built.

    Args:
        build: makes a launch, or several, of its arguments and of what never changes. A tensor in a launch is an
            operand, a view that starts where an operand does, the launch's scratch, or a copy; a call that needs a copy
            is built every time.
        operands: tensors, numbers, None and launch configs; also in tuples and lists.
    """
    kind: list = [build]
    tensors: list[Tensor] = []
    _describe(operands, kind, tensors)
    x = tensors[0]
    device = x.get_device()
    kind.append(device)
    key = tuple(kind)
    addresses = [x.data_ptr() for x in tensors]
    plan = _plans.get(key)
    if plan is None or not _aligned(addresses) or _watched(plan.runtime):
        _build(build, operands, key, addresses)
    elif plan.driver.get_current_device() == device:
        _launch(plan, device, addresses, x)
    else:
        with torch.cuda.device(device):
            _launch(plan, device, addresses, x)


def _describe(operands: Iterable, kind: list, tensors: list[Tensor]) -> None:
    """Find the tensors among operands, and what tells one kind of calls from another."""
    for x in operands:
        if isinstance(x, Tensor):
            tensors.append(x)
            kind += (x.shape, x.stride(), x.dtype)
        elif isinstance(x, (tuple, list)):
            kind.append(len(x))
            _describe(x, kind, tensors)
        else:
            kind.append(x)


def _aligned(addresses: Iterable[int]) -> bool:
    return functools.reduce(operator.or_, addresses) % _SIXTEEN_BYTES == 0


def _watched(runtime: Any) -> bool:
    """Whether somebody wants to be told of launches: by a hook of their own, or in Triton's chain of hooks."""
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _launch(plan: _Plan, device: int, addresses: list[int], x: Tensor) -> None:
    if plan.scratch is not None:
        # kept until all is launched
        scratch = x.new_empty(plan.scratch[0], dtype=plan.scratch[1])
        addresses.append(scratch.data_ptr())
    values = (*addresses, *plan.constants)
    stream = plan.driver.get_current_stream(device)
    for kernel, pick in plan.launches:
        kernel(stream, *pick(values))


def _build(build: Callable, operands: tuple, key: tuple, addresses: list[int]) -> None:
    """Build and run a call's launches, and remember them where that serves others."""
    launches = build(*operands)
    launches = (launches,) if isinstance(launches, Launch) else tuple(launches)
    compiled = [launch.run() for launch in launches]
    if (plan := _plan(launches, compiled, addresses)) is not None:
        remember(_plans, key, plan)


def _plan(launches: tuple[Launch, ...], compiled: list, addresses: list[int]) -> _Plan | None:
    """The plan of calls like one whose tensors have these addresses; None where they do not tell the tensors apart."""
    import triton

    rooms = {launch.scratch.data_ptr(): launch.scratch for launch in launches if launch.scratch is not None}
    addresses = [*addresses, *rooms]
    if not all(hasattr(kernel, name) for kernel in compiled for name in _REPLAYED):
        # the interpreter, or another Triton
        return None
    if len(rooms) > 1 or not _aligned(addresses):
        return None
    constants, bound = [], []
    for launch, kernel in zip(launches, compiled, strict=True):
        # the kernel, its metadata, and nothing for hooks
        arguments = [kernel.function, kernel.packed_metadata, None, None, None]
        values = launch.args | launch.constexprs
        arguments += [values[param.name] for param in launch.kernel.params]
        places = []
        for value in arguments:
            if not isinstance(value, Tensor):
                places.append(len(addresses) + len(constants))
                constants.append(value)
            elif addresses.count(value.data_ptr()) == 1:
                places.append(addresses.index(value.data_ptr()))
            else:
                return None
        grid = (*launch.grid, 1, 1)[:3]
        bound.append((functools.partial(kernel.run, *grid), operator.itemgetter(*places)))
    scratch = next(((tuple(x.shape), x.dtype) for x in rooms.values()), None)
    driver = triton.runtime.driver.active
    return _Plan(tuple(bound), tuple(constants), scratch, driver, triton.knobs.runtime)
