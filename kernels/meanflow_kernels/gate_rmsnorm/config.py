"""Launch configs of gate_rmsnorm; :class:`~meanflow_kernels.rows.config.RowConfig` explains the fields.

One for all architectures. None is measured yet: they are those of gate_adaln and bias_gelu, whose rows and sums are
alike.
"""

from ..rows.config import RowConfig
from ..tiling import TileConfig

# one warp a row up to 768 columns, two up to 1536; a program takes two rows, so that many small programs share the SMs
FORWARD = RowConfig(columns_per_warp=768, warps_per_sm=32, fewest_rows=1, most_rows=2)

# two sums and two vectors in registers; the prefetch of the next two rows keeps memory busy. H200: 1.03 times as fast
# as 16 warps on an SM (iMF-XL/2)
BACKWARD = RowConfig(columns_per_warp=384, warps_per_sm=12, fewest_rows=8, most_rows=64, stages=3)

# all rows share one sum: programs as narrow as these are many, and all their loads on their way at once
SUMS = TileConfig(block_r=256, block_c=16, num_warps=8)
