"""Launch configs of the 16-bit forward that are worth timing on sm_90, in the order of belief.

Rows as in config.py; the shipped configs are among them. All compile without spills for Triton 3.6 and 3.7 and serialise no wgmma. What is believed: three
stages keep a tile in flight where two keep none, 128 rows a program halve the traffic of k and v through L2, explicit
sums spare the column of ones its way through registers, and eight warps in two programs hide each other's waits.
"""

from .config import AttentionConfig, Rows


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int, *words: str) -> AttentionConfig:
    """A config by its label's words."""
    return AttentionConfig(
        *(block_m, block_n, num_warps, num_stages),
        ones="summed" not in words,
        packed="packed" in words,
        separate="separate" in words,
    )


_DUAL_64 = (
    _tiles(128, 32, 8, 3, "packed"),
    _tiles(64, 64, 4, 3, "packed", "separate"),
    _tiles(128, 32, 8, 4, "packed"),
    _tiles(64, 64, 4, 3, "packed"),
    _tiles(64, 32, 4, 3, "packed", "separate"),
    _tiles(64, 32, 4, 3, "packed"),
    _tiles(128, 64, 8, 3, "packed", "separate"),
    _tiles(64, 64, 4, 2, "packed", "separate"),
    _tiles(64, 64, 4, 2),
)
# one tile of q a head: 64 rows, and little to prefetch
_DUAL_64_SHORT = (
    _tiles(64, 64, 4, 2, "packed"),
    _tiles(64, 32, 4, 2, "packed", "separate"),
    _tiles(64, 64, 4, 2, "packed", "separate"),
    _tiles(64, 32, 4, 2, "packed"),
    _tiles(64, 32, 4, 1, "packed"),
    _tiles(64, 64, 4, 1, "packed"),
    _tiles(64, 64, 4, 2),
)
_DUAL_72 = (
    _tiles(64, 32, 4, 4, "packed", "summed"),
    _tiles(64, 32, 4, 3, "packed", "separate", "summed"),
    _tiles(64, 32, 4, 3, "packed", "summed"),
    _tiles(64, 64, 4, 2, "packed", "separate", "summed"),
    _tiles(128, 32, 8, 3, "packed", "summed"),
    _tiles(128, 64, 8, 3, "packed", "separate", "summed"),
    _tiles(64, 32, 4, 2, "packed", "summed"),
    _tiles(64, 64, 4, 2, "packed", "summed"),
    _tiles(64, 32, 4, 3),
    _tiles(64, 64, 4, 2),
)
DUAL: Rows = ((64, 128, _DUAL_64), (64, 0, _DUAL_64_SHORT), (72, 0, _DUAL_72))

_PLAIN_64 = (
    _tiles(128, 64, 8, 3),
    _tiles(128, 64, 8, 4),
    _tiles(64, 64, 4, 3),
    _tiles(128, 64, 4, 3),
    _tiles(64, 64, 4, 4),
    _tiles(128, 128, 8, 3),
    _tiles(64, 128, 4, 3),
    _tiles(64, 128, 4, 2),
)
_PLAIN_64_SHORT = (
    _tiles(64, 64, 4, 2),
    _tiles(64, 32, 4, 2),
    _tiles(64, 64, 4, 1),
    _tiles(64, 32, 4, 1),
    _tiles(64, 128, 4, 2),
)
_PLAIN_72 = (
    _tiles(128, 64, 8, 3, "summed"),
    _tiles(64, 64, 4, 3, "summed"),
    _tiles(128, 64, 8, 4, "summed"),
    _tiles(128, 64, 8, 3),
    _tiles(64, 64, 4, 3),
    _tiles(128, 64, 4, 3, "summed"),
    _tiles(64, 64, 4, 2, "summed"),
    _tiles(128, 32, 8, 4, "summed"),
    _tiles(64, 128, 4, 2),
)
PLAIN: Rows = ((64, 128, _PLAIN_64), (64, 0, _PLAIN_64_SHORT), (72, 0, _PLAIN_72))
