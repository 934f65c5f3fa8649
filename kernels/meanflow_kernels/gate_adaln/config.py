"""Launch configs of gate_adaln; :class:`~meanflow_kernels.adaln.config.RowConfig` explains the fields.

Figures are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90; run times are not
measured.
"""

from ..adaln.config import RowConfig
from ..tiling import TileConfig

FORWARD = RowConfig(columns_per_warp=384, warps_per_sm=32, fewest_rows=1, most_rows=8)

BACKWARD = RowConfig(columns_per_warp=384, warps_per_sm=16, fewest_rows=8, most_rows=64, stages=3)

SUMS = TileConfig(block_r=32, block_c=128, num_warps=4)
