"""Launch configs of gate_adaln; :class:`~meanflow_kernels.adaln.config.RowConfig` explains the fields.

Figures are those of the cross-compiled kernels at C = 1152, fp32 stream and bf16 branches, sm_90; run times are not
measured.
"""

from ..adaln.config import RowConfig

# x, y and their tangents: two warps a row from C = 1024 on, 160 registers in the dual kernel (one warp: 240, on the
# brink of spilling), 6 rows on an SM. 768 columns fit one warp in 165.
FORWARD = RowConfig(columns_per_warp=768, programs=4096, fewest_rows=1, most_rows=8)

# three sums a column and two vectors in registers: 234, 4 rows on an SM, so the prefetch of the next two rows is what
# keeps memory busy (one warp a row spills; so do two stages at C = 384 on sm_100). 30 KB of shared memory a row at most
BACKWARD = RowConfig(columns_per_warp=576, programs=1024, fewest_rows=8, most_rows=64, stages=3)
