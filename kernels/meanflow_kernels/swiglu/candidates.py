"""Launch configs of swiglu worth timing beside the shipped ones."""

from ..tiling import variations
from .config import BACKWARD, FORWARD, FlatConfig

FORWARD_CANDIDATES: tuple[FlatConfig, ...] = variations(FORWARD, block=(1024, 2048, 4096), num_warps=(4, 8))
BACKWARD_CANDIDATES: tuple[FlatConfig, ...] = variations(BACKWARD, block=(1024, 2048, 4096), num_warps=(4, 8))
