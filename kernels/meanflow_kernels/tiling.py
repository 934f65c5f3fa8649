"""How rows are cut into programs: tiles as data, and shares that fill whole waves of what a GPU holds at once."""

from dataclasses import dataclass, replace
from itertools import product

import torch


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The least power of two that is n or more; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class TileConfig:
    """A program's tile of a matrix."""

    block_r: int
    """Rows of a tile."""
    block_c: int
    """Columns of a tile."""
    num_warps: int


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; where there is none, those of an H100 and an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def rows_per_program(strips: int, rows: int, *, programs: int, fewest: int, most: int) -> int:
    """Rows that one program takes of one of `strips` strips, each `rows` high; no program straddles two.

    Args:
        programs: what the GPU holds at once. The grid is one wave of them, or as many whole waves as `most` demands: a
            last wave that is nearly empty would take as long as a full one.
        fewest, most: bounds of the result.
    """
    waves = max(1, ceil_div(strips * rows, programs * most))
    programs_per_strip = max(1, waves * programs // max(1, strips))
    return min(max(ceil_div(rows, programs_per_strip), fewest), most)


@dataclass(frozen=True)
class StripConfig(TileConfig):
    """A program's tile, and how many of them, one below the other, it takes."""

    warps_per_sm: int
    """Warps that a multiprocessor holds at once, by registers: the grid fills it in whole waves."""
    fewest_rows: int
    """Rows a program takes at least: what its partial sum is spread over."""
    most_rows: int
    """Rows a program takes at most."""

    def rows_per_program(self, strips: int, rows: int, device: torch.device) -> int:
        """Rows that a program takes of one of `strips` strips of so many rows: whole tiles."""
        resident = multiprocessors(device) * max(1, self.warps_per_sm // self.num_warps)
        share = rows_per_program(strips, rows, programs=resident, fewest=self.fewest_rows, most=self.most_rows)
        return ceil_div(share, self.block_r) * self.block_r


def variations(config, **fields: tuple) -> tuple:
    """``config`` with every combination of these values of its fields."""
    return tuple(replace(config, **dict(zip(fields, values, strict=True))) for values in product(*fields.values()))
