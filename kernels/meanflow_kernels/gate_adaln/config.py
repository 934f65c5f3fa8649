"""Launch configs of gate_adaln; :class:`~meanflow_kernels.rows.config.RowConfig` explains the fields.

Registers are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90. Gains are those of
``benchmarks.tune`` on an H200, mean and range over the steps of S/2, B/4, L/2 and XL/2 (benchmarks/results/h200).
"""

from dataclasses import replace

from ..rows.config import RowConfig
from ..tiling import TileConfig

# one warp a row up to 768 columns, two up to 1536; a program takes two rows, so that many small programs share the SMs.
# H200: 1.10 (1.01 to 1.18) times as fast as 384 columns a warp and eight rows a program
FORWARD = RowConfig(columns_per_warp=768, warps_per_sm=32, fewest_rows=1, most_rows=2)

# without a tangent the compiler takes 50 registers, unless it is told that 96 are there: then it has more loads on
# their way. H200: 1.06 (1.00 to 1.17) times as fast
PRIMAL = replace(FORWARD, max_registers=96)

# four sums and two vectors; the prefetch of the next two rows keeps memory busy. 36 KB of shared memory a program at
# most. H200: 1.04 (0.97 to 1.09) times as fast as 16 warps on an SM of at most 128 registers
BACKWARD = RowConfig(columns_per_warp=384, warps_per_sm=8, fewest_rows=8, most_rows=64, stages=3)

# a kilobyte of a row of partial sums a program. H200: 1.61 (1.07 to 2.82) times as fast as 32x128 with four warps
SUMS = TileConfig(block_r=32, block_c=256, num_warps=2)
