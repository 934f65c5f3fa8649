"""Launch config of the kernels that hold a row in registers, and that of adaln.

One for all architectures: registers are the same to a few, and shared memory is far below what any of them has.
Figures are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90; run times are not
measured.
"""

from dataclasses import dataclass

from ..tiling import TileConfig


@dataclass(frozen=True)
class RowConfig:
    """How the rows of a launch are shared out."""

    columns_per_warp: int
    """Columns that one warp holds; a longer row is shared by two, four, ... warps, which exchange sums."""
    warps_per_sm: int
    """Warps that a multiprocessor holds at once, by registers: the grid fills it in whole waves."""
    fewest_rows: int
    """Rows a program takes at least: what its partial sums are spread over."""
    most_rows: int
    """Rows a program takes at most."""
    stages: int = 1
    """Stages of the loop over rows: with n > 1, the next n - 1 rows are on their way while one is worked on."""

    def num_warps(self, width: int) -> int:
        """Warps that hold a row of `width` columns."""
        shares = -(-width // self.columns_per_warp)
        return min(32, 1 << (shares - 1).bit_length())

    def tile(self, width: int) -> int:
        """Columns of a tile: four a thread, which are 16 bytes of fp32 and 8 of 16 bits, whole lines a warp."""
        return min(128 * self.num_warps(width), 1 << (width - 1).bit_length())


# 384 columns a warp are twelve a thread: one, two and four warps hold the rows of the DiT family (384, 768, 1024 and
# 1152), in 38 to 72 registers, 32 warps on an SM and more: 74 KB of the dual kernel's rows on their way, where an
# H200's SM needs 29 KB (36 GB/s x 0.8 us). A program's later rows find shift and scale in L1
FORWARD = RowConfig(columns_per_warp=384, warps_per_sm=32, fewest_rows=1, most_rows=8)

# two sums and a vector in registers: 96 at most, 20 warps on an SM. A program leaves two fp32 sums a column: 6 % of the
# rows' bytes at 13 rows a program
BACKWARD = RowConfig(columns_per_warp=384, warps_per_sm=20, fewest_rows=8, most_rows=64)

# 512 contiguous bytes a row of partial sums, of which each sample has 8 to 32
SUMS = TileConfig(block_r=32, block_c=128, num_warps=4)
