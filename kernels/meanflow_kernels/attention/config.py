"""Launch configs of attention, as data: rows of (largest head dim, config), by architecture and arithmetic.

The reasons are static: registers a thread, spills and shared memory from cross-compilation; no config has been timed
yet. The static report prints the figures of every row.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of one launch."""

    block_m: int
    """rows of q a program holds, or a loop step loads"""
    block_n: int
    """rows of k and v a loop step loads, or a program holds"""
    num_warps: int
    num_stages: int

    def __str__(self):
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"


Rows = tuple[tuple[int, AttentionConfig], ...]

# wgmma needs 64 rows a warp group. Two programs fit an SM at hd 64 and 72 (170 and 219 registers, 80 and 100 KB of
# shared memory) and hide each other's waits; four warps on 64 rows of k give the 16-wide column tile of hd 72 its
# 16-byte loads; 128 rows with 4 warps spill
_DUAL_90: Rows = ((80, AttentionConfig(64, 64, 4, 2)), (128, AttentionConfig(64, 32, 4, 2)))
# three programs an SM at hd 64 and 72 (about 164 registers)
_PLAIN_90: Rows = ((96, AttentionConfig(64, 128, 4, 2)), (128, AttentionConfig(64, 64, 4, 2)))
_BWD_DQ_90: Rows = ((128, AttentionConfig(64, 64, 4, 2)),)
_BWD_DKDV_90: Rows = ((80, AttentionConfig(64, 64, 4, 2)), (128, AttentionConfig(32, 64, 4, 2)))

# mma.sync keeps q and q_dot in registers: smaller tiles. These fit 99 KB of shared memory, so they serve every other
# architecture too
_DUAL: Rows = (
    (32, AttentionConfig(64, 64, 4, 2)),
    (64, AttentionConfig(64, 32, 4, 2)),
    # two warps on 32 rows of k give the 16-wide column tile of hd 72 its 16-byte loads; 64x64 spills
    (96, AttentionConfig(32, 32, 2, 2)),
    (128, AttentionConfig(32, 32, 4, 2)),
)
_PLAIN: Rows = ((80, AttentionConfig(64, 64, 4, 2)), (128, AttentionConfig(64, 32, 4, 2)))
# the two warps of hd 72 as above; 64x64 and, for dk and dv, 32x64 spill on one architecture or another
_BWD_DQ: Rows = (
    (64, AttentionConfig(64, 32, 4, 2)),
    (80, AttentionConfig(32, 32, 2, 2)),
    (128, AttentionConfig(64, 32, 4, 2)),
)
_BWD_DKDV: Rows = (
    (64, AttentionConfig(32, 64, 4, 2)),
    (80, AttentionConfig(32, 32, 2, 2)),
    (128, AttentionConfig(16, 64, 4, 2)),
)
# two warps on hd 72 spill 44 bytes where ptxas targets Blackwell; with four the 16-wide column tile loads 8 bytes
_DUAL_100: Rows = (*_DUAL[:2], (128, AttentionConfig(32, 32, 4, 2)))
_BWD_DKDV_100: Rows = (_BWD_DKDV[0], _BWD_DKDV[2])

# IEEE products run on the FMA pipes with their operands in registers: many warps, and small tiles for wide heads
# (the rows for one head dim alone: its neighbours' tiles spill 4 to 48 bytes there, with Triton 3.6 or 3.7)
_DUAL_FP32: Rows = (
    (64, AttentionConfig(32, 32, 8, 2)),
    (72, AttentionConfig(16, 16, 8, 2)),
    (80, AttentionConfig(16, 16, 4, 2)),
    (128, AttentionConfig(16, 16, 8, 2)),
)
_PLAIN_FP32: Rows = (
    (40, AttentionConfig(32, 32, 8, 2)),
    (48, AttentionConfig(16, 16, 8, 2)),
    (64, AttentionConfig(32, 32, 8, 2)),
    (80, AttentionConfig(16, 16, 8, 2)),
    (88, AttentionConfig(16, 16, 4, 2)),
    (128, AttentionConfig(16, 16, 8, 2)),
)
_BWD_DQ_FP32: Rows = ((128, AttentionConfig(16, 16, 8, 2)),)
_BWD_DKDV_FP32: Rows = (
    (64, AttentionConfig(16, 32, 8, 2)),
    (88, AttentionConfig(16, 16, 4, 2)),
    (96, AttentionConfig(16, 16, 8, 2)),
    (128, AttentionConfig(16, 16, 4, 2)),
)


def _pick(rows: Rows, head_dim: int) -> AttentionConfig:
    return next(config for largest, config in rows if head_dim <= largest)


def dual_config(arch: int, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """The config of the forward with a tangent."""
    if dtype == torch.float32:
        return _pick(_DUAL_FP32, head_dim)
    return _pick(_DUAL_90 if arch == 90 else _DUAL_100 if arch >= 100 else _DUAL, head_dim)


def plain_config(arch: int, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """The config of the forward without a tangent."""
    rows = _PLAIN_FP32 if dtype == torch.float32 else _PLAIN_90 if arch == 90 else _PLAIN
    return _pick(rows, head_dim)


def backward_configs(arch: int, dtype: torch.dtype, head_dim: int) -> tuple[AttentionConfig, AttentionConfig]:
    """The configs of the backward's two kernels: dq, then dk and dv."""
    if dtype == torch.float32:
        dq, dkdv = _BWD_DQ_FP32, _BWD_DKDV_FP32
    elif arch == 90:
        dq, dkdv = _BWD_DQ_90, _BWD_DKDV_90
    else:
        dq, dkdv = _BWD_DQ, _BWD_DKDV_100 if arch >= 100 else _BWD_DKDV
    return _pick(dq, head_dim), _pick(dkdv, head_dim)
