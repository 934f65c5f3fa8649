"""Launch configs of gate_adaln; :class:`~meanflow_kernels.adaln.config.RowConfig` explains the fields.

Figures are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90; run times are not
measured.
"""

from ..adaln.config import RowConfig
from ..tiling import TileConfig

# x, y and their tangents in 64 registers at most, 32 warps on an SM: 110 KB on their way. More rows a program spare L2
# the three to six vectors, which are half a row's bytes
FORWARD = RowConfig(columns_per_warp=384, warps_per_sm=32, fewest_rows=1, most_rows=8)

# three sums and two vectors in 128 registers, 16 warps on an SM; the prefetch of the next two rows keeps memory busy.
# 36 KB of shared memory a program at most. At 16 rows a program, its sums are 4 % of the rows' bytes
BACKWARD = RowConfig(columns_per_warp=384, warps_per_sm=16, fewest_rows=8, most_rows=64, stages=3)

# 512 contiguous bytes a row of partial sums, of which each sample has 4 to 16
SUMS = TileConfig(block_r=32, block_c=128, num_warps=4)
