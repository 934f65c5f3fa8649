"""Checks and launches of the operators on rows: strides, their alignment, and the rows that one program takes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import tiling
from ..checks import KERNEL_DTYPES, check_alike, check_kernel_dtype, check_real, check_shape, fail
from ..launch import CompileCase, Launch, strides
from ..tiling import ceil_div
from .config import RowConfig

UNIT = 16
"""Elements that a stride is a multiple of, at best: what Triton needs to know for 16-byte accesses."""


def check_vectors(x: Tensor, names: tuple[str, ...], vectors: tuple[Tensor, ...]) -> None:
    """Each vector is (B, C) for x (B, L, C), on its device; all share one dtype, which may differ from x's."""
    for name, vector in zip(names, vectors, strict=True):
        check_shape(name, vector, (x.shape[0], x.shape[2]), "(B, C)")
        check_alike(("x", name), (x, vector), dtype=False)
    check_alike(names, vectors)
    for name, tensor in (("x", x), (names[0], vectors[0])):
        check_real(name, tensor)


def check_kernel_row(x: Tensor, names: tuple[str, ...], tensors: tuple[Tensor, ...], out_dtype: torch.dtype) -> None:
    """Dtypes that the row kernels take, and a row to normalise."""
    for name, tensor in zip(names, tensors, strict=True):
        check_kernel_dtype(name, tensor)
    if out_dtype not in KERNEL_DTYPES:
        check_kernel_dtype("out_dtype", torch.empty(0, dtype=out_dtype, device="meta"))
    if x.shape[-1] == 0:
        fail("x", f"shape {tuple(x.shape)}", "(B, L, C) with C > 0", "a norm needs a column")


def dense_rows(x: Tensor | None) -> Tensor | None:
    """x with contiguous columns: itself, or one copy where its last stride is not 1."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _shares(x: Tensor, config: RowConfig) -> tuple[int, int]:
    """The grid of a row kernel for x (B, L, C), and the rows that one program takes, all of one sample."""
    samples, length, width = x.shape
    resident = tiling.multiprocessors(x.device) * max(1, config.warps_per_sm // config.num_warps(width))
    bounds = {"fewest": config.fewest_rows, "most": config.most_rows}
    rows = tiling.rows_per_program(samples, length, programs=resident, **bounds)
    return samples * ceil_div(length, rows), rows


def row_launch(
    kernel,
    config: RowConfig,
    *,
    rows: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    contiguous: dict[str, Tensor | None],
    scalars: dict[str, int | float],
    tile: dict[str, int] | None = None,
    scratch: Tensor | None = None,
) -> Launch:
    """One launch over the rows of samples.

    Args:
        kernel: its parameters are named `{tensor}_ptr`, `stride_{tensor}_b`, `stride_{tensor}_l`, or as a scalar is.
        rows: strided (B, L, C) tensors; the first is present and gives the grid. vectors: strided (B, C) tensors.
        contiguous: tensors without strides. tile: the kernel's constants in the place of C and TILE. scratch: which of
            the tensors are room for partial sums.
    """
    rows = {name: dense_rows(x) for name, x in rows.items()}
    vectors = {name: dense_rows(x) for name, x in vectors.items()}
    steps = {}
    for tensors, letters in ((rows, "bl"), (vectors, "b")):
        for name, x in tensors.items():
            for letter, stride in zip(letters, strides(x, len(letters)), strict=True):
                steps[f"stride_{name}_{letter}"] = stride
    unit = math.gcd(UNIT, *steps.values())
    x = next(iter(rows.values()))
    width = x.shape[2]
    tile = tile or {"C": width, "TILE": config.tile(width)}
    programs, rows_per_program = _shares(x, config)
    return Launch(
        kernel=kernel,
        grid=(programs,),
        args={
            **{f"{name}_ptr": x for name, x in {**rows, **vectors, **contiguous}.items()},
            **{name: stride // unit for name, stride in steps.items()},
            "L": x.shape[1],
            "rows_per_program": rows_per_program,
            **scalars,
        },
        constexprs={**tile, "ALIGN": unit, "STAGES": config.stages},
        num_warps=config.num_warps(width),
        num_stages=config.stages,
        max_registers=config.max_registers,
        scratch=scratch,
    )


def partial_sums(count: int, x: Tensor, config: RowConfig, width: int | None = None) -> Tensor:
    """Room for `count` fp32 sums over the rows of each program, (count, programs, width), for x (B, L, C); width is C
    unless it is given.
    """
    shape = (count, _shares(x, config)[0], x.shape[2] if width is None else width)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def stream_and_norm(x: Tensor, samples: int, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for a residual stream like x (B, L, C), and for what is normalised of it, for so many samples."""
    shape = (samples, *x.shape[1:])
    return x.new_empty(shape), x.new_empty(shape, dtype=out_dtype)


DIT_WIDTHS = (384, 768, 1024, 1152)
IMF_WIDTHS = (768, 1024)


def row_cases(
    launches: Callable[[Tensor, Tensor, Tensor], dict[str, Launch]], widths: tuple[int, ...] = DIT_WIDTHS
) -> list[CompileCase]:
    """Cases of cross-compilation at the widths of a family, of a fp32 stream, a bf16 branch and bf16 vectors.

    launches: makes an operator's launches by name, from a stream (B, L, C), a branch (B, L, C) and a vector (B, C).
    """
    cases = []
    for width in widths:
        x = torch.empty(32, 256, width, device="meta")
        y, vector = x.bfloat16(), torch.empty(32, 6 * width, dtype=torch.bfloat16, device="meta")[:, :width]
        for op, case in launches(x, y, vector).items():
            cases.append(CompileCase(op, f"w{case.num_warps} s{case.num_stages}", y.dtype, width, case))
    return cases
