"""Triton's host side without a GPU: launches of kernels on CPU tensors that are neither compiled nor run.

All that Triton does before a launch and with its result is done; results are whatever their memory held.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import meanflow_kernels
from meanflow_kernels.routing import Route, force_route

ARCHITECTURE = 90


class _Driver:
    """A GPU with a CPU's tensors, whose device torch calls -1."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def nothing_launched(launch: Callable[..., object] = lambda *arguments: None) -> Iterator[None]:
    """Within it the operators' kernels serve CPU tensors, and `launch` is called as Triton's compiled launchers are.

    Raises:
        RuntimeError: where Triton interprets, which launches nothing.
    """
    import triton
    import triton.compiler

    class Compiled(triton.compiler.CompiledKernel):
        """What Triton keeps of a kernel that it has compiled and loaded."""

        def __init__(self, source: Any):
            self.src, self.name, self.metadata, self.packed_metadata = source, source.fn.__name__, None, (4, 1, 0)
            self.module, self.function, self._run = 1, 1, launch

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: got 1, wanted none; unset it")
    for module in pkgutil.walk_packages(meanflow_kernels.__path__, "meanflow_kernels."):
        if module.name.endswith(("kernel", "partials")):
            importlib.import_module(module.name)
    compile, triton.compiler.compile = triton.compiler.compile, lambda source, **_: Compiled(source)
    triton.runtime.driver.set_active(_Driver())
    # without it the operators refuse CPU tensors
    triton.knobs.runtime.interpret = True
    try:
        with force_route(Route.TRITON):
            yield
    finally:
        triton.knobs.runtime.interpret, triton.compiler.compile = False, compile
        triton.runtime.driver.set_active(None)
