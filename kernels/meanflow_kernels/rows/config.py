"""Launch config of the kernels that hold a row in registers."""

from dataclasses import dataclass

from ..tiling import ceil_div, next_power_of_two


@dataclass(frozen=True)
class RowConfig:
    """How the rows of a launch are shared out."""

    columns_per_warp: int
    """Columns that one warp holds; a longer row is shared by two, four, ... warps, which exchange sums."""
    warps_per_sm: int
    """Warps that a multiprocessor holds at once, by registers: the grid fills it in whole waves."""
    fewest_rows: int
    """Rows a program takes at least: what its partial sums are spread over."""
    most_rows: int
    """Rows a program takes at most."""
    stages: int = 1
    """Stages of the loop over rows: with n > 1, the next n - 1 rows are on their way while one is worked on."""
    max_registers: int | None = None
    """Registers a thread may take, instead of as many as the compiler chooses by itself: fewer, so that `warps_per_sm`
    fit, or more, for more loads at once."""

    def num_warps(self, width: int) -> int:
        """Warps that hold a row of `width` columns."""
        return min(32, next_power_of_two(ceil_div(width, self.columns_per_warp)))

    def tile(self, width: int) -> int:
        """Columns of a tile: four a thread, which are 16 bytes of fp32 and 8 of 16 bits, whole lines a warp."""
        return min(128 * self.num_warps(width), next_power_of_two(width))
