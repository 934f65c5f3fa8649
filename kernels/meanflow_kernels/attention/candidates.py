"""Launch configs of attention in 16 bits that are worth timing beside the shipped ones, in the order of belief.

Those of sm_90 compile without spills for Triton 3.6 and 3.7 and serialise no wgmma. What is believed of them: three
stages keep a tile in flight where two keep none, 128 rows a program halve the traffic of k and v through L2, explicit
sums spare the column of ones its way through registers, and two programs an SM hide each other's waits. The persistent
kernel does without any wait but its barriers'.
"""

from itertools import product

import torch

from .config import PERSISTENT, AttentionConfig, PersistentConfig, serves


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int, *words: str) -> AttentionConfig:
    """A config by its label's words."""
    return AttentionConfig(
        *(block_m, block_n, num_warps, num_stages),
        ones="summed" not in words,
        packed="packed" in words,
        separate="separate" in words,
    )


_DUAL_90 = {
    64: (
        _tiles(128, 32, 8, 3, "packed"),
        _tiles(64, 64, 4, 3, "packed", "separate"),
        _tiles(128, 32, 8, 4, "packed"),
        _tiles(64, 64, 4, 3, "packed"),
        _tiles(64, 32, 4, 3, "packed", "separate"),
        _tiles(64, 32, 4, 3, "packed"),
        # a single tile of q: 64 rows, and little to prefetch
        _tiles(64, 64, 4, 2, "packed"),
        _tiles(64, 64, 4, 2, "packed", "separate"),
        _tiles(64, 32, 4, 2, "packed", "separate"),
        _tiles(64, 32, 4, 2, "packed"),
        _tiles(64, 64, 4, 1, "packed"),
        _tiles(64, 32, 4, 1, "packed"),
        _tiles(128, 64, 8, 3, "packed", "separate"),
    ),
    72: (
        _tiles(64, 32, 4, 4, "packed", "summed"),
        _tiles(64, 32, 4, 3, "packed", "separate", "summed"),
        _tiles(64, 32, 4, 3, "packed", "summed"),
        _tiles(64, 64, 4, 2, "packed", "separate", "summed"),
        _tiles(128, 32, 8, 3, "packed", "summed"),
        _tiles(128, 64, 8, 3, "packed", "separate", "summed"),
        _tiles(64, 32, 4, 2, "packed", "summed"),
        _tiles(64, 64, 4, 2, "packed", "summed"),
        _tiles(64, 32, 4, 3),
    ),
}
_PLAIN_90 = {
    64: (
        _tiles(128, 64, 8, 3),
        _tiles(64, 64, 4, 3),
        _tiles(128, 64, 8, 4),
        # a single tile of q
        _tiles(64, 64, 4, 2),
        _tiles(64, 32, 4, 2),
        _tiles(64, 64, 4, 1),
        _tiles(64, 32, 4, 1),
        _tiles(128, 64, 4, 3),
        _tiles(64, 64, 4, 4),
        _tiles(128, 128, 8, 3),
        _tiles(64, 128, 4, 3),
    ),
    72: (
        _tiles(128, 64, 8, 3, "summed"),
        _tiles(64, 64, 4, 3, "summed"),
        _tiles(128, 64, 8, 4, "summed"),
        _tiles(128, 64, 8, 3),
        _tiles(64, 64, 4, 3),
        _tiles(128, 64, 4, 3, "summed"),
        _tiles(64, 64, 4, 2, "summed"),
        _tiles(128, 32, 8, 4, "summed"),
    ),
}
# small tiles: what every architecture can hold
_COMMON = tuple(_tiles(m, n, 4, s) for m, n, s in product((32, 64), (32, 64), (2, 3)))


def dual_candidates(arch: int, dtype: torch.dtype, head_dim: int) -> tuple[AttentionConfig | PersistentConfig, ...]:
    """For the forward with tangents of q, k and v."""
    found = (PERSISTENT, PersistentConfig(2), *_DUAL_90.get(head_dim, ())) if arch == 90 else _COMMON
    return tuple(config for config in found if serves(config, dtype, head_dim, every=True))


def plain_candidates(arch: int, head_dim: int) -> tuple[AttentionConfig, ...]:
    """For the forward without a tangent."""
    return _PLAIN_90.get(head_dim, ()) if arch == 90 else _COMMON


def backward_candidates(arch: int) -> tuple[tuple[AttentionConfig, AttentionConfig], ...]:
    """For the backward's two kernels: (dq, dk and dv)."""
    tiles = ((64, 64), (64, 64)), ((64, 32), (32, 64)), ((64, 32), (64, 64)), ((64, 64), (32, 64))
    depths = (2, 3) if arch == 90 else (1, 2)
    return tuple((_tiles(*dq, 4, stages), _tiles(*dkdv, 4, stages)) for (dq, dkdv), stages in product(tiles, depths))
