"""Launch configs of bias_gelu worth timing beside the shipped ones."""

from dataclasses import replace
from itertools import product

from ..tiling import StripConfig, TileConfig, variations
from .config import BACKWARD, FORWARD, SUMS

FORWARD_CANDIDATES: tuple[TileConfig, ...] = tuple(
    replace(FORWARD, block_r=r, block_c=c, num_warps=w) for r, c, w in ((4, 512, 4), (4, 512, 2), (8, 512, 8))
)
# rows and columns of a tile, its warps, and how many warps an SM holds of it
_TILES = ((2, 512, 4, 40), (2, 512, 2, 32), (4, 256, 4, 40), (1, 1024, 4, 36), (4, 512, 4, 24), (4, 512, 8, 40))
BACKWARD_CANDIDATES: tuple[StripConfig, ...] = tuple(
    replace(BACKWARD, block_r=r, block_c=c, num_warps=w, warps_per_sm=held, fewest_rows=fewest)
    for (r, c, w, held), fewest in product((*_TILES, (8, 512, 8, 24), (1, 512, 1, 32)), (16, 32, 64))
)
SUMS_CANDIDATES: tuple[TileConfig, ...] = variations(
    SUMS, block_r=(128, 64, 256), block_c=(32, 64, 16), num_warps=(4, 8)
)
