"""Imported by every command before anything else: finds its environment (:mod:`meanflow.startup`)."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if importlib.util.find_spec("meanflow") is None:  # not installed: the source tree does
    sys.path += [str(HERE.parent), str(HERE.parent / "kernels")]

from meanflow.startup import enter  # noqa: E402

if Path(sys.argv[0]).resolve().parent == HERE:  # not where another program imports a command
    enter(Path(sys.argv[0]).name, ("numpy", "safetensors", "torch", "tqdm", "tyro"))
