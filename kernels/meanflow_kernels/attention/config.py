"""Choices of attention, as data: which implementation serves a call, and the launch configs of the Triton kernels.

The reasons of the launch configs are static: registers a thread, spills and shared memory from cross-compilation, which
the static report prints for every one. Their length is that of q.
"""

import enum
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import ANY


class Backend(enum.Enum):
    """An implementation of attention without a tangent."""

    CUDNN = "SDPA cuDNN"
    FLASH = "SDPA flash"
    FLASH_ATTN = "flash-attn"
    XFORMERS = "xformers"
    TRITON = "Triton"


Rows = tuple[tuple[int, int, Any], ...]
"""(largest head dim, shortest length, choice): the first row counts whose range holds a call."""
Backends = dict[int, Rows]
"""By architecture, the back-ends in order of preference; Triton comes last without being named. A call's length is the
shorter of M and N.
"""

_LIBRARIES = (Backend.FLASH, Backend.FLASH_ATTN, Backend.XFORMERS)
_CUDNN_FIRST = (Backend.CUDNN, *_LIBRARIES)

# H200, N 256, B H 4096, bf16: cuDNN 1.21 ms, flash 1.83 at hd 72; 0.87 and 1.07 at hd 64. Nothing else was timed
BACKWARD: Backends = {
    90: ((56, 0, _LIBRARIES), (72, 128, _CUDNN_FIRST), (128, 0, _LIBRARIES)),
    ANY: ((128, 0, _LIBRARIES),),
}
# the same: cuDNN 0.29 ms, Triton 0.43, flash 0.52 at hd 72; 0.20, 0.27 and 0.30 at hd 64
FORWARD: Backends = {
    90: ((56, 0, ()), (72, 128, (Backend.CUDNN,)), (128, 0, ())),
    ANY: ((128, 0, ()),),
}
# the samples of a batch beside those with a tangent: a library's o is copied to its place, which takes what it saves
BESIDE: Backends = {ANY: ((128, 0, ()),)}


def _pick(rows: Rows, head_dim: int, length: int) -> Any:
    return next(x for largest, shortest, x in rows if head_dim <= largest and length >= shortest)


def preferred(table: Backends, arch: int, head_dim: int, length: int) -> tuple[Backend, ...]:
    """The back-ends of a table for a call, in order."""
    return _pick(table.get(arch, table[ANY]), head_dim, length)


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles and code paths of one launch."""

    block_m: int
    """rows of q a program holds, or a loop step loads"""
    block_n: int
    """rows of k and v a loop step loads, or a program holds"""
    num_warps: int
    num_stages: int
    ones: bool = True
    """forward: row sums from a column of ones beside v, where its column tiles leave one free"""
    packed: bool = False
    """dual forward: rounds p s_dot two values a conversion"""
    separate: bool = False
    """dual forward: p_dot v and p v_dot in accumulators of their own"""

    def __str__(self):
        words = [f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"]
        words += [word for word in ("packed", "separate") if getattr(self, word)]
        return " ".join(words + ["summed"] * (not self.ones))


# wgmma needs 64 rows a warp group. Two programs fit an SM at hd 64 and 72 (170 and 219 registers, 80 and 100 KB of
# shared memory) and hide each other's waits; four warps on 64 rows of k give the 16-wide column tile of hd 72 its
# 16-byte loads; 128 rows with 4 warps spill
_DUAL_90: Rows = ((80, 0, AttentionConfig(64, 64, 4, 2)), (128, 0, AttentionConfig(64, 32, 4, 2)))
# three programs an SM at hd 64 and 72 (about 164 registers)
_PLAIN_90: Rows = ((96, 0, AttentionConfig(64, 128, 4, 2)), (128, 0, AttentionConfig(64, 64, 4, 2)))
_BWD_DQ_90: Rows = ((128, 0, AttentionConfig(64, 64, 4, 2)),)
_BWD_DKDV_90: Rows = ((80, 0, AttentionConfig(64, 64, 4, 2)), (128, 0, AttentionConfig(32, 64, 4, 2)))

# mma.sync keeps q and q_dot in registers: smaller tiles. These fit 99 KB of shared memory, so they serve every other
# architecture too
_DUAL: Rows = (
    (32, 0, AttentionConfig(64, 64, 4, 2)),
    (64, 0, AttentionConfig(64, 32, 4, 2)),
    # two warps on 32 rows of k give the 16-wide column tile of hd 72 its 16-byte loads; 64x64 spills
    (96, 0, AttentionConfig(32, 32, 2, 2)),
    (128, 0, AttentionConfig(32, 32, 4, 2)),
)
_PLAIN: Rows = ((80, 0, AttentionConfig(64, 64, 4, 2)), (128, 0, AttentionConfig(64, 32, 4, 2)))
# the two warps of hd 72 as above; 64x64 and, for dk and dv, 32x64 spill on one architecture or another
_BWD_DQ: Rows = (
    (64, 0, AttentionConfig(64, 32, 4, 2)),
    (80, 0, AttentionConfig(32, 32, 2, 2)),
    (128, 0, AttentionConfig(64, 32, 4, 2)),
)
_BWD_DKDV: Rows = (
    (64, 0, AttentionConfig(32, 64, 4, 2)),
    (80, 0, AttentionConfig(32, 32, 2, 2)),
    (128, 0, AttentionConfig(16, 64, 4, 2)),
)
# two warps on hd 72 spill 44 bytes where ptxas targets Blackwell; with four the 16-wide column tile loads 8 bytes
_DUAL_100: Rows = (*_DUAL[:2], (128, 0, AttentionConfig(32, 32, 4, 2)))
_BWD_DKDV_100: Rows = (_BWD_DKDV[0], _BWD_DKDV[2])

# IEEE products run on the FMA pipes with their operands in registers: many warps, and small tiles for wide heads
# (the rows for one head dim alone: its neighbours' tiles spill 4 to 48 bytes there, with Triton 3.6 or 3.7)
_DUAL_FP32: Rows = (
    (64, 0, AttentionConfig(32, 32, 8, 2)),
    (72, 0, AttentionConfig(16, 16, 8, 2)),
    (80, 0, AttentionConfig(16, 16, 4, 2)),
    (128, 0, AttentionConfig(16, 16, 8, 2)),
)
_PLAIN_FP32: Rows = (
    (40, 0, AttentionConfig(32, 32, 8, 2)),
    (48, 0, AttentionConfig(16, 16, 8, 2)),
    (64, 0, AttentionConfig(32, 32, 8, 2)),
    (80, 0, AttentionConfig(16, 16, 8, 2)),
    (88, 0, AttentionConfig(16, 16, 4, 2)),
    (128, 0, AttentionConfig(16, 16, 8, 2)),
)
_BWD_DQ_FP32: Rows = ((128, 0, AttentionConfig(16, 16, 8, 2)),)
_BWD_DKDV_FP32: Rows = (
    (64, 0, AttentionConfig(16, 32, 8, 2)),
    (88, 0, AttentionConfig(16, 16, 4, 2)),
    (96, 0, AttentionConfig(16, 16, 8, 2)),
    (128, 0, AttentionConfig(16, 16, 4, 2)),
)


def dual_config(arch: int, dtype: torch.dtype, head_dim: int, length: int) -> AttentionConfig:
    """The config of the forward with a tangent of ``length`` queries."""
    rows = _DUAL_FP32 if dtype == torch.float32 else _DUAL_90 if arch == 90 else _DUAL_100 if arch >= 100 else _DUAL
    return _pick(rows, head_dim, length)


def plain_config(arch: int, dtype: torch.dtype, head_dim: int, length: int) -> AttentionConfig:
    """The config of the forward without a tangent of ``length`` queries."""
    rows = _PLAIN_FP32 if dtype == torch.float32 else _PLAIN_90 if arch == 90 else _PLAIN
    return _pick(rows, head_dim, length)


def backward_configs(
    arch: int, dtype: torch.dtype, head_dim: int, length: int
) -> tuple[AttentionConfig, AttentionConfig]:
    """The configs of the backward's two kernels, dq, then dk and dv, for ``length`` queries."""
    if dtype == torch.float32:
        tables = _BWD_DQ_FP32, _BWD_DKDV_FP32
    elif arch == 90:
        tables = _BWD_DQ_90, _BWD_DKDV_90
    else:
        tables = _BWD_DQ, _BWD_DKDV_100 if arch >= 100 else _BWD_DKDV
    dq, dkdv = (_pick(rows, head_dim, length) for rows in tables)
    return dq, dkdv
