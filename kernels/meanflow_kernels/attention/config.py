"""Choices of attention, as data: which implementation serves a call, and the launch configs of our kernels.

Where a comment gives milliseconds or a gain, ``benchmarks.tune`` measured it on an H200 (benchmarks/results/h200). The
other reasons are static: registers a thread, spills and shared memory from cross-compilation, which the static report
prints for every config. A row's length is that of q.
"""

import enum
import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import ANY
from ..tiling import StripConfig, TileConfig


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
"""By architecture, in order of preference; Triton is last, unnamed. A call's length is the shorter of M and N."""

_LIBRARIES = (Backend.FLASH, Backend.FLASH_ATTN, Backend.XFORMERS)

# H200, bf16, ms of one layer of a step: Triton 0.107, cuDNN 0.122, flash 0.148 at hd 64 and N 256 (L/2, batch 32);
# 0.091, 0.180 and 0.308 at N 64 (B/4, batch 256); 0.160, 0.158 and 0.226 at hd 72 (XL/2, batch 32), where
# Triton's is repeatable, and writes where its reader wants it. At hd 72 and N 1024 cuDNN 2.82, Triton 3.20, flash 4.61
# (64 x 16 heads)
BACKWARD: Backends = {
    90: ((56, 0, _LIBRARIES), (72, 512, (Backend.CUDNN, *_LIBRARIES)), (72, 0, ()), (128, 0, _LIBRARIES)),
    ANY: ((128, 0, _LIBRARIES),),
}
# the same, guidance pass: cuDNN 0.054, Triton 0.060, flash 0.081 at hd 72; 0.038, 0.041 and 0.054 at hd 64; at N 64
# 0.073, 0.037 and 0.100
FORWARD: Backends = {90: ((56, 0, ()), (72, 128, (Backend.CUDNN,)), (128, 0, ())), ANY: ((128, 0, ()),)}
# the samples of a batch beside those with a tangent, where a library's o is copied to its place: cuDNN 0.048, Triton
# 0.038 at hd 72; 0.053 and 0.027 at hd 64
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


@dataclass(frozen=True)
class PersistentConfig:
    """The persistent kernel (persistent_kernel.py) of the dual forward on sm_90."""

    num_stages: int
    """tiles of k and v, and of their tangents, in flight, 64 rows each"""

    def __str__(self):
        return f"persistent s{self.num_stages}"


PERSISTENT = PersistentConfig(3)


def serves(config: AttentionConfig | PersistentConfig, dtype: torch.dtype, head_dim: int, *, every: bool) -> bool:
    """Whether a config of the dual forward takes a dtype, a head dim, and tangents of all of q, k and v (``every``) or
    of some.
    """
    if isinstance(config, AttentionConfig):
        return True
    return dtype == torch.bfloat16 and head_dim in (64, 72) and every and _has_gluon()


@functools.cache
def _has_gluon() -> bool:
    try:
        triton = importlib.import_module("triton")
        importlib.import_module(".persistent_kernel", __package__)
    except Exception:  # Gluon is experimental: another Triton may have it otherwise, or not at all
        return False
    # Gluon has no interpreter
    return not triton.knobs.runtime.interpret


# wgmma needs 64 rows a warp group; wide heads stay within two programs an SM. Here the first row counts that holds a
# call and whose config serves it
DUAL_90: Rows = (
    # 1.07 to 1.21 (hd 64) and 1.22 to 1.30 times (hd 72) as fast as the tiles below at B H of 128 to 4096, N 256, and
    # 1.28 at N 1024 (hd 72). Without a tangent such a kernel took 1.01 to 1.19 times as long as the tiles
    (72, 128, PERSISTENT),
    # 1.05 to 1.35 times as fast as 64x64 w4 s2 (L/2, S/2): no conversion of single values, copies of a step ahead
    (64, 128, AttentionConfig(128, 32, 8, 3, packed=True)),
    # 1.10 (B/4, N 64)
    (64, 0, AttentionConfig(64, 32, 4, 2, packed=True)),
    # 128x64 w8 s3 with packed rounding and separate sums is 1.04 times as fast for 8 samples of 16 heads (XL/2's step),
    # but took 1.02 ms for 256 samples where these took 0.88
    (80, 0, AttentionConfig(64, 64, 4, 2)),
    (128, 0, AttentionConfig(64, 32, 4, 2)),
)
_PLAIN_90: Rows = (
    # 1.07 times as fast as 64x128 w4 s2 at N 256 (L/2, S/2), 1.65 at N 64 (B/4)
    (64, 0, AttentionConfig(64, 64, 4, 3)),
    # 1.22 (XL/2)
    (72, 128, AttentionConfig(128, 64, 8, 3)),
    (96, 0, AttentionConfig(64, 128, 4, 2)),
    (128, 0, AttentionConfig(64, 64, 4, 2)),
)
# 1.06 to 1.08 times as fast as 64x64 w4 s2 at hd 64, 1.04 at hd 72
_BWD_DQ_90: Rows = (
    (64, 0, AttentionConfig(64, 32, 4, 3)),
    (72, 0, AttentionConfig(64, 32, 4, 2)),
    (128, 0, AttentionConfig(64, 64, 4, 2)),
)
_BWD_DKDV_90: Rows = (
    (64, 0, AttentionConfig(32, 64, 4, 3)),
    (80, 0, AttentionConfig(64, 64, 4, 2)),
    (128, 0, AttentionConfig(32, 64, 4, 2)),
)

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
# (rows for a single head dim exist because the neighbouring row spills 4 to 48 bytes there, with Triton 3.6 or 3.7)
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
    (32, 0, AttentionConfig(16, 32, 8, 2)),
    (48, 0, AttentionConfig(16, 16, 4, 2)),
    (64, 0, AttentionConfig(16, 32, 8, 2)),
    (72, 0, AttentionConfig(16, 16, 4, 2)),
    # four warps spill 20 bytes on sm_80
    (80, 0, AttentionConfig(16, 16, 8, 2)),
    (88, 0, AttentionConfig(16, 16, 4, 2)),
    (96, 0, AttentionConfig(16, 16, 8, 2)),
    (128, 0, AttentionConfig(16, 16, 4, 2)),
)

# a library's three gradients into one, and their sums for a bias: two 16-byte loads a thread and tile on their way, as
# bias_gelu's backward, and a partial sum of 4 bytes a column where a row is 4. Neither is timed yet
PACK = StripConfig(block_r=16, block_c=128, num_warps=4, warps_per_sm=32, fewest_rows=32, most_rows=128)
# as bias_gelu's: more programs than SMs, all their loads on their way at once
BIAS_SUMS = TileConfig(block_r=256, block_c=16, num_warps=8)


def dual_config(
    arch: int, dtype: torch.dtype, head_dim: int, length: int, *, every: bool = True
) -> AttentionConfig | PersistentConfig:
    """The config of the forward with a tangent of ``length`` queries; ``every``: of all of q, k and v."""
    rows = _DUAL_FP32 if dtype == torch.float32 else DUAL_90 if arch == 90 else _DUAL_100 if arch >= 100 else _DUAL
    return _pick(tuple(row for row in rows if serves(row[2], dtype, head_dim, every=every)), head_dim, length)


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
