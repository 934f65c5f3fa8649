"""How a kernel that walks rows is launched: strides, their alignment, and the rows that one program takes."""

import math

import torch
from torch import Tensor

from .. import tiling
from ..launch import Launch
from .config import RowConfig

UNIT = 16
"""Elements that a stride is a multiple of, at best: what Triton needs to know for 16-byte accesses."""


def dense_rows(x: Tensor | None) -> Tensor | None:
    """x with contiguous columns: itself, or one copy where its last stride is not 1."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor | None, dims: int) -> list[int]:
    if x is None:
        return [0] * dims
    # the stride of a dimension of size 1 is any number: it must not spoil the alignment
    return [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape[:dims], strict=False)]


def _shares(x: Tensor, config: RowConfig) -> tuple[int, int]:
    """The grid of a row kernel for x (B, L, C), and the rows that one program takes, all of one sample."""
    samples, length, width = x.shape
    resident = tiling.multiprocessors(x.device) * max(1, config.warps_per_sm // config.num_warps(width))
    bounds = {"fewest": config.fewest_rows, "most": config.most_rows}
    rows = tiling.rows_per_program(samples, length, programs=resident, **bounds)
    return samples * -(-length // rows), rows


def row_launch(
    kernel,
    config: RowConfig,
    *,
    rows: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    contiguous: dict[str, Tensor | None],
    scalars: dict[str, int | float],
) -> Launch:
    """One launch over the rows of samples.

    Args:
        kernel: its parameters are named `{tensor}_ptr`, `stride_{tensor}_b`, `stride_{tensor}_l`, or as a scalar is.
        rows: strided (B, L, C) tensors; the first is present and gives the grid. vectors: strided (B, C) tensors.
        contiguous: tensors without strides.
    """
    rows = {name: dense_rows(x) for name, x in rows.items()}
    vectors = {name: dense_rows(x) for name, x in vectors.items()}
    strides = {}
    for tensors, letters in ((rows, "bl"), (vectors, "b")):
        for name, x in tensors.items():
            for letter, stride in zip(letters, _strides(x, len(letters)), strict=True):
                strides[f"stride_{name}_{letter}"] = stride
    unit = math.gcd(UNIT, *strides.values())
    x = next(iter(rows.values()))
    width = x.shape[2]
    programs, rows_per_program = _shares(x, config)
    return Launch(
        kernel=kernel,
        grid=(programs,),
        args={
            **{f"{name}_ptr": x for name, x in {**rows, **vectors, **contiguous}.items()},
            **{name: stride // unit for name, stride in strides.items()},
            "L": x.shape[1],
            "rows_per_program": rows_per_program,
            **scalars,
        },
        constexprs={"C": width, "TILE": config.tile(width), "ALIGN": unit, "STAGES": config.stages},
        num_warps=config.num_warps(width),
        num_stages=config.stages,
    )


def partial_sums(count: int, x: Tensor, config: RowConfig) -> Tensor:
    """Room for `count` fp32 sums over the rows of each program, (count, programs, C), for x (B, L, C)."""
    return torch.empty(count, _shares(x, config)[0], x.shape[2], dtype=torch.float32, device=x.device)
