"""How rows are cut into programs: whole waves, whatever the batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meanflow_kernels.tiling import rows_per_program


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 600), st.integers(1, 1024), st.integers(1, 2112), st.integers(1, 64))
def test_bounds(strips, rows, programs, most):
    fewest = min(8, most)
    assert fewest <= rows_per_program(strips, rows, programs=programs, fewest=fewest, most=most) <= most


# strips, rows of one, programs that the GPU holds, most rows of a program
GRIDS = {
    "xl, batch 32": (32, 256, 1056, 8),
    "xl, batch 40": (40, 256, 1056, 16),
    "xl, batch 32, 108 multiprocessors": (32, 256, 864, 16),
    "xl backward": (32, 256, 528, 64),
    "b/4, batch 256": (256, 64, 2112, 8),
    "several waves": (128, 256, 1056, 8),
    "columns of the xl hidden layer": (9, 8192, 1320, 128),
}


@pytest.mark.parametrize(("strips", "rows", "programs", "most"), GRIDS.values(), ids=GRIDS)
def test_the_last_wave_is_full(strips, rows, programs, most):
    share = rows_per_program(strips, rows, programs=programs, fewest=1, most=most)
    grid = strips * -(-rows // share)
    waves = -(-grid // programs)
    assert grid >= 0.93 * waves * programs
    assert waves <= -(-strips * rows // (programs * most)) + 1
