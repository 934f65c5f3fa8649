"""Mutated images, tar files, folders, latents and manifests: a result, or one line of refusal; never more."""

import json

import pytest
from fresh import ROOT, run_forked

GIGABYTE = 2**30


@pytest.mark.parametrize("first, count", [(0, 300), pytest.param(300, 20_000, marks=pytest.mark.slow)])
def test_fuzz_of_the_readers(first, count):
    here = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    done = run_forked(f"{here}import fuzz_readers\nfuzz_readers.main({first}, {count})", 3600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert sum(found["ends"].values()) == count
    assert found["memory"] < 2 * GIGABYTE
    # mutations that only break, or never do, would try little
    ends = {"image decoded", "image unreadable", "tars read", "tars refused", "latents read", "latents refused"}
    assert (
        ends | {"manifest made whole", "folders read and read", "folders refused and refused"} <= found["ends"].keys()
    )
