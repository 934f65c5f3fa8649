"""Launch configs of gate_rmsnorm worth timing beside the shipped ones."""

from ..rows.config import RowConfig
from ..tiling import TileConfig, variations
from .config import BACKWARD, FORWARD, SUMS

FORWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    FORWARD, columns_per_warp=(384, 768, 1152), warps_per_sm=(32, 20), most_rows=(8, 2)
)
BACKWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    BACKWARD, columns_per_warp=(384, 768), warps_per_sm=(16, 12, 20), stages=(3, 1)
)
SUMS_CANDIDATES: tuple[TileConfig, ...] = variations(SUMS, block_r=(128, 256), block_c=(32, 64, 16), num_warps=(4, 8))
