"""Launch configs of bias_gelu: one for all architectures, no shared memory but for the bias.

Gains are those of ``benchmarks.tune`` on an H200, mean and range over the steps of S/2, B/4, L/2 and XL/2
(benchmarks/results/h200).
"""

from ..tiling import StripConfig, TileConfig

# all four hidden widths of the DiT family (1536, 3072, 4096, 4608) are multiples of 512. Four 16-byte loads a thread
# and tensor are on their way at once; the bias is fetched once for eight rows
FORWARD = TileConfig(block_r=8, block_c=512, num_warps=4)

# two 16-byte loads a thread and tensor on their way. The sum over rows stays in registers; a partial sum is 4 bytes a
# column where a row is 6. H200: 1.13 (1.08 to 1.16) times as fast as four warps with one load each
BACKWARD = StripConfig(block_r=2, block_c=512, num_warps=2, warps_per_sm=32, fewest_rows=16, most_rows=128)

# so narrow that there are more programs than SMs, and all their loads on their way at once. H200: 1.17 (1.04 to 1.35)
# times as fast as 128x32 with four warps
SUMS = TileConfig(block_r=256, block_c=16, num_warps=8)
