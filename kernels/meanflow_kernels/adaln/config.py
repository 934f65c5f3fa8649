"""Launch configs of adaln; :class:`~meanflow_kernels.rows.config.RowConfig` explains the fields.

One for all architectures: registers are the same to a few, and shared memory is far below what any of them has.
Registers are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90. Gains are those of
``benchmarks.tune`` on an H200, mean and range over the steps of S/2, B/4, L/2 and XL/2 (benchmarks/results/h200).
"""

from ..rows.config import RowConfig
from ..tiling import TileConfig

# one warp a row up to 768 columns, two up to 1536; a program takes two rows, so that many small programs share the SMs.
# H200: 1.07 (1.00 to 1.12) times as fast as 384 columns a warp and eight rows a program
FORWARD = RowConfig(columns_per_warp=768, warps_per_sm=32, fewest_rows=1, most_rows=2)

# two sums and a vector in registers, so few warps; the next two rows are on their way while one is worked on. H200:
# 1.09 (1.02 to 1.18) times as fast as 384 columns a warp, 20 warps and no prefetch
BACKWARD = RowConfig(columns_per_warp=768, warps_per_sm=12, fewest_rows=8, most_rows=64, stages=3)

# 512 contiguous bytes a row of partial sums, of which each sample has 8 to 32
SUMS = TileConfig(block_r=32, block_c=128, num_warps=4)
