"""Launch config of the kernels that hold a row in registers, and that of adaln.

One for all architectures: registers are the same to a few, and shared memory is far below what any of them has.
Figures are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90; run times are not
measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowConfig:
    """How the rows of a launch are shared out."""

    columns_per_warp: int
    """Columns that one warp holds; a longer row is shared by two, four, ... warps, which exchange sums."""
    programs: int
    """A program takes more rows as long as this many programs remain."""
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


# one warp a row: every sum is five shuffles, with no barrier and no shared memory. The dual kernel's 156 registers
# leave 12 rows on an SM: 110 KB on their way, where an H200's SM needs 29 KB (36 GB/s x 0.8 us). A program's later rows
# find shift and scale in L1; 4096 programs fill the SMs at least twice over.
FORWARD = RowConfig(columns_per_warp=1152, programs=4096, fewest_rows=1, most_rows=8)

# two sums a column stay in registers, so two warps share a row: 166 registers, 6 rows on an SM. A program leaves two
# fp32 sums a column: at 8 rows a program that is 20 % of the rows' bytes (in L2), at 32 rows 5 %.
BACKWARD = RowConfig(columns_per_warp=576, programs=1024, fewest_rows=8, most_rows=64)
