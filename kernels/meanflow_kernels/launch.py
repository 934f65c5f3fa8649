"""One Triton launch as data: run it on tensors, or cross-compile it without a GPU exactly as Triton's launcher would.

Contract of an op's folder:

- ``config.py`` holds the launch configs as data, tile sizes, warps and stages, each with the reason in a comment. One
  serves all architectures, within 99 KB of shared memory; attention alone has tables by architecture and head dim.
- ``candidates.py`` holds configs worth timing beside those, as data too, where there are any.
- ``reference.py`` holds the operator as mathematics, ``kernel.py`` the Triton kernels.
- ``op.py`` has a launcher that builds :class:`Launch` objects from tensors and a config, the shipped one by default;
  the registered operators, which name it (``registration.py``); the public functions; and ``compile_cases(arch)``,
  exported by the folder's ``__init__.py``: a :class:`CompileCase` for each shipped config and dtype, built by the same
  launcher from meta tensors, so that a test compiles what runs.

Nothing here imports Triton before a launch is run or compiled.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ANY = 0
"""Key of what serves every architecture without an entry of its own."""

_TRITON_TYPE = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments."""

    kernel: Any
    """the @triton.jit function"""
    grid: tuple[int, ...]
    args: dict[str, Tensor | int | float | None]
    """run-time arguments by parameter name"""
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """of a thread; None leaves them to the compiler"""
    scratch: Tensor | None = None
    """the argument that is room for what one launch leaves to the next, new in each call"""

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self):
        """Launch on the device of the tensors; CPU tensors need Triton's interpreter.

        Returns:
            Triton's compiled kernel; None in the interpreter.

        Raises:
            RuntimeError: CPU tensors while Triton is not interpreting.
        """
        import triton

        x = next(x for x in self.args.values() if isinstance(x, Tensor))
        if not x.is_cuda and not triton.knobs.runtime.interpret:
            raise RuntimeError(
                f"the Triton kernel was asked for {x.device} tensors: set TRITON_INTERPRET=1 before the first import "
                "of triton to run it in the interpreter, or use force_route(Route.REFERENCE)"
            )
        with torch.cuda.device_of(x):
            return self.kernel[self.grid](**self.args, **self.constexprs, **self.options)


@dataclass(frozen=True)
class CompileCase:
    """A shipped launch config to be cross-compiled: ``launch`` holds meta tensors."""

    op: str
    """the op's stem, such as "attention_jvp" """
    label: str
    """the config in words, such as "64x64 w4 s2" """
    dtype: torch.dtype
    width: int
    """head dim for attention, model width for the others"""
    launch: Launch

    @property
    def num_warps(self) -> int:
        return self.launch.num_warps

    @property
    def num_stages(self) -> int:
        return self.launch.num_stages

    def source(self):
        """Triton's ASTSource, specialised as its launcher does: aligned pointers, integers divisible by 16 or 1.

        For ``triton.compile(case.source(), target=GPUTarget("cuda", arch, 32), options=case.launch.options)``, in a
        process without TRITON_INTERPRET.
        """
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        signature, constants, attrs = {}, {}, {}
        for i, param in enumerate(self.launch.kernel.params):
            if param.is_constexpr:
                signature[param.name], constants[(i,)] = "constexpr", self.launch.constexprs[param.name]
                continue
            value = self.launch.args[param.name]
            kind = _argument_type(value, param.do_not_specialize)
            signature[param.name] = kind
            if kind == "constexpr":
                constants[(i,)] = value
            elif isinstance(value, Tensor) or (
                isinstance(value, int) and not param.do_not_specialize and value % 16 == 0
            ):
                attrs[(i,)] = [["tt.divisibility", 16]]
        source = GluonASTSource if self.launch.kernel.is_gluon() else ASTSource
        return source(self.launch.kernel, signature, constants, attrs)


def _argument_type(value: Tensor | int | float | None, plain: bool) -> str:
    """The type Triton's launcher gives an argument; None, and 1 unless ``plain``, become constants."""
    if value is None or (isinstance(value, int) and value == 1 and not plain):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + _TRITON_TYPE[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """The first strides of x; 0 where x is absent, and of a dimension of size 1, whose stride is any number."""
    if x is None:
        return (0,) * dims
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride()[:dims], x.shape[:dims], strict=True))


def arch_of(device: torch.device) -> int:
    """80 for sm_80, 90 for sm_90, ...; ``ANY`` where there is no GPU (the interpreter, fake tensors)."""
    if device.type != "cuda":
        return ANY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
