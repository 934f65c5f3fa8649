"""Launch configs of adaln worth timing beside the shipped ones."""

from ..rows.config import RowConfig
from ..tiling import variations
from .config import BACKWARD, FORWARD

FORWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    FORWARD, columns_per_warp=(384, 1152, 768), warps_per_sm=(32, 20, 48), most_rows=(8, 2)
)
BACKWARD_CANDIDATES: tuple[RowConfig, ...] = variations(
    BACKWARD, columns_per_warp=(384, 768), warps_per_sm=(20, 12, 28), stages=(1, 2, 3)
)
