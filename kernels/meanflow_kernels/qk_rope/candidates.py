"""Launch configs of qk_rope worth timing beside the shipped ones."""

from ..rows.config import RowConfig
from ..tiling import TileConfig, variations
from .config import BACKWARD, FORWARD, SUMS

FORWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    FORWARD, columns_per_warp=(1024, 2048), warps_per_sm=(32, 24), most_rows=(2, 4, 8)
)
BACKWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    BACKWARD, columns_per_warp=(1024, 2048), warps_per_sm=(12, 20), fewest_rows=(4, 8)
)
SUMS_CANDIDATES: tuple[TileConfig, ...] = variations(SUMS, block_r=(256, 512, 1024), block_c=(8, 16), num_warps=(4, 8))
