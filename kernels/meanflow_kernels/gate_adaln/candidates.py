"""Launch configs of gate_adaln worth timing beside the shipped ones."""

from ..rows.config import RowConfig
from ..tiling import TileConfig, variations
from .config import BACKWARD, FORWARD, PRIMAL, SUMS

FORWARD_CANDIDATES: tuple[RowConfig, ...] = (
    variations(FORWARD, columns_per_warp=(384, 768, 1152), warps_per_sm=(32, 20, 40), most_rows=(8, 4, 2))
    + variations(FORWARD, columns_per_warp=(384, 768), stages=(2,))
    + variations(FORWARD, max_registers=(96, 112))
)
PRIMAL_CANDIDATES: tuple[RowConfig, ...] = variations(
    PRIMAL, columns_per_warp=(384, 768, 1152), warps_per_sm=(32, 20), most_rows=(8, 4, 2)
) + variations(PRIMAL, warps_per_sm=(32, 16), max_registers=(None, 64, 96, 112, 128))
BACKWARD_CANDIDATES: tuple[RowConfig, ...] = (
    variations(BACKWARD, columns_per_warp=(384, 768), warps_per_sm=(16, 8, 12), stages=(3, 2, 1))
    + variations(BACKWARD, fewest_rows=(8, 16, 32), stages=(3, 1))
    + variations(BACKWARD, warps_per_sm=(16, 8), max_registers=(128,))
)
SUMS_CANDIDATES: tuple[TileConfig, ...] = variations(
    SUMS, block_r=(32, 64, 16), block_c=(128, 64, 256), num_warps=(4, 2)
)
