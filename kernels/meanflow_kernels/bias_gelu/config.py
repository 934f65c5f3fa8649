"""Launch configs of bias_gelu: one for all architectures, no shared memory but for the bias.

Figures are those of the cross-compiled kernels, bf16, sm_90; run times are not measured.
"""

from ..tiling import StripConfig, TileConfig

# all four hidden widths of the DiT family (1536, 3072, 4096, 4608) are multiples of 512. Four 16-byte loads a thread
# and tensor are on their way at once; the bias is fetched once for eight rows
FORWARD = TileConfig(block_r=8, block_c=512, num_warps=4)

# 48 registers, 40 warps on an SM: one 16-byte load a thread and tensor, 40 KB on their way. The sum over rows stays in
# registers; a partial sum is 4 bytes a column where a row is 6, 1 % at 58 rows
BACKWARD = StripConfig(block_r=2, block_c=512, num_warps=4, warps_per_sm=40, fewest_rows=16, most_rows=128)

# narrow, so that there are as many programs as SMs (144 at 4608 columns), and all their loads on their way at once
SUMS = TileConfig(block_r=128, block_c=32, num_warps=4)
