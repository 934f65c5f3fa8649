"""Launch config of bias_gelu: one for all architectures, no shared memory but for the bias.

Figures are those of the cross-compiled kernels, bf16, sm_90; run times are not measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """A program's tile of the (rows, C) matrix."""

    block_r: int
    """Rows of a tile."""
    block_c: int
    """Columns of a tile: all four hidden widths of the DiT family (1536, 3072, 4096, 4608) are multiples of 512."""
    num_warps: int
    programs: int = 1
    """The backward: a program takes more tiles, one below the other, as long as this many programs remain."""
    most_rows: int = 1
    """The backward: rows a program takes at most."""


# four 16-byte loads a thread and tensor are on their way at once; the bias is fetched once for eight rows
FORWARD = TileConfig(block_r=8, block_c=512, num_warps=4)

# the sum over rows stays in registers; a partial sum is 8 bytes a column in 6 for each row, 1 % at 128 rows
BACKWARD = TileConfig(block_r=8, block_c=512, num_warps=4, programs=2048, most_rows=256)
