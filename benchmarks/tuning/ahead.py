"""Compile the kernels of the tuner's configs side by side, ahead of the process that times them.

Workers have no GPU: Triton's own launcher specialises a kernel for meta tensors as it does for a GPU's, and stops where
it would load it. What they leave in Triton's cache on disk is what the launch looks for.
"""

import functools
import multiprocessing
import os
from collections.abc import Iterable

from ..harness import arbiter
from .subjects import Subject, subjects
from .trials import Trial

MOST = 15
"""Workers: a container's cores may be fewer than the machine's that it sees."""
SECONDS = 60
"""Seconds after which compiling a config is given up; one kernel takes 1 to 10."""


class _Target:
    """A stand-in for the driver that knows nothing but the architecture."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def _subjects(arch: int, device: str) -> list[Subject]:
    return subjects(arch, device)


@functools.cache
def _trial(arch: int, device: str, index: int) -> Trial:
    return _subjects(arch, device)[index].build("meta")


@functools.cache
def _take_place(arch: int) -> None:
    from triton.runtime import driver

    driver.set_active(_Target(arch))


def compile_one(arch: int, device: str, index: int, config: int) -> str | None:
    """Compile the launches of a subject's config into Triton's cache; the reason where that fails."""
    _take_place(arch)
    try:
        for launch in _trial(arch, device, index).launches(_subjects(arch, device)[index].configs[config]):
            arguments = launch.args | launch.constexprs | launch.options
            launch.kernel.run(**arguments, grid=launch.grid, warmup=True)
    except Exception as error:  # the worker goes on with the next
        return f"does not compile: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1][:200]}"


class Ahead:
    """The compilations of all chosen subjects, under way in the order in which they will be asked for."""

    def __init__(self, arch: int, device: str, chosen: Iterable[int]):
        # a fresh process that never meets CUDA, from which the workers are forked with everything imported
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        # one core is left to the process that times
        self._pool = context.Pool(min(MOST, max(1, len(os.sched_getaffinity(0)) - 1)))
        every = subjects(arch, device)
        self._found = {
            (index, config): self._pool.apply_async(compile_one, (arch, device, index, config))
            for index in chosen
            for config, value in enumerate(every[index].configs)
            if every[index].compiles(value)
        }

    def why_not(self, index: int, config: int) -> str | None:
        """Wait for a config; the reason where it does not compile."""
        found = self._found.get((index, config))
        if found is None:
            return None
        until = arbiter.running_seconds() + SECONDS
        while not found.ready() and arbiter.running_seconds() < until:
            found.wait(1)
        return found.get() if found.ready() else f"does not compile: not in {SECONDS} s"

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
