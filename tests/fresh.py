"""Processes of their own for the tests."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """For a Python from the source tree that neither interprets Triton nor takes itself for a worker of this pytest."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    # what comes behind is a GPU's stand-in, where there is one
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
