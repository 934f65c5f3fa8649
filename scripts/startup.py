"""Where every command begins: finds its environment, then runs it (:mod:`meanflow.startup`, meanflow/apps)."""

import importlib
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(name):
    """Run the command meanflow.apps.NAME, in the environment that it needs."""
    if importlib.util.find_spec("meanflow") is None:  # not installed: the source tree does
        sys.path += [str(HERE.parent), str(HERE.parent / "kernels")]
    from meanflow.startup import enter

    enter(f"{name}.py", ("numpy", "safetensors", "torch", "tqdm", "tyro"))
    importlib.import_module(f"meanflow.apps.{name}").run()
