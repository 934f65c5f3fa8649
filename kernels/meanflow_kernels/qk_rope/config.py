"""Launch configs of qk_rope; :class:`~meanflow_kernels.rows.config.RowConfig` explains the fields.

A row is a token's queries and keys, 2 H D columns. One config for all architectures; none is measured yet.
"""

from ..rows.config import RowConfig
from ..tiling import TileConfig

# a warp a row: a tile is four heads of 64, of 16 bits one 16-byte load a thread, and all eight (16 heads) are
# independent of each other; nothing is exchanged between warps. 72 registers (sm_90)
FORWARD = RowConfig(columns_per_warp=2048, warps_per_sm=32, fewest_rows=1, most_rows=2)

# two sums of a tile in registers, 96 in all; a partial sum is two heads wide where a row has 2 H
BACKWARD = RowConfig(columns_per_warp=2048, warps_per_sm=20, fewest_rows=4, most_rows=64)

# a sum is as narrow as a head, so few programs: each has many loads on their way at once
SUMS = TileConfig(block_r=1024, block_c=16, num_warps=8)
