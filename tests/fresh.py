"""Processes of their own for the tests."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

FORKS = multiprocessing.get_context("forkserver")
"""Starts processes that have imported the trainer already, which takes seconds: all are forked from one that has."""
FORKS.set_forkserver_preload(["meanflow.training.trainer", "torch.utils.tensorboard", "sklearn.datasets"])


def environment() -> dict[str, str]:
    """For a Python from the source tree that neither interprets Triton nor takes itself for a worker of this pytest."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    # what comes behind is a GPU's stand-in, where there is one
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    return inherited | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


BARE = """
import importlib.abc, sys

ABSENT = {"tyro", "diffusers", "flash_attn", "xformers", "apex", "jvp_flash_attention"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_bare(program: str) -> subprocess.CompletedProcess:
    """Run a program's text where the package's other dependencies and the peers are not installed."""
    command = [sys.executable, "-c", BARE + program]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def run_forked(program: str, seconds: float = 300) -> subprocess.CompletedProcess:
    """Run a program's text to its end, whatever ends it, in one of FORKS."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(program, *said))
        process.start()
        process.join(seconds)
        code = process.exitcode
        process.kill()
        return subprocess.CompletedProcess(program, code, *(path.read_text() for path in said))


def _run(program: str, stdout: Path, stderr: Path) -> None:
    import torch

    for number, path in enumerate((stdout, stderr), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
