"""Small training runs for the tests, and runs that die."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from meanflow.presets import preset

STEPS, SAVE_EVERY = 10, 4


def tiny(**train):
    """Digits by a tiny network; log intervals do not divide the checkpoints' so that a resume falls between them."""
    config = preset("digits")
    return replace(
        config,
        model=replace(config.model, depth=1, hidden_size=16, num_heads=2),
        train=replace(
            config.train,
            **{"steps": STEPS, "batch": 8, "log_every": 3, "save_every": SAVE_EVERY, "sample_every": 5, "keep_last": 2}
            | {"device": "cpu"}
            | train,
        ),
    )


def curve(out: Path) -> list[dict]:
    """The log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in ("time", "images_per_second")} for row in rows]


def final_state(out: Path) -> dict:
    """All tensors of the last checkpoint, bit for bit."""
    last = max((out / "checkpoints").glob("step_*.safetensors"))
    return {name: x.numpy().tobytes() for name, x in load_file(last).items()}


def train_in_process(out: Path, prelude: str = "", **train) -> subprocess.CompletedProcess:
    """Train the tiny run in a process of its own, after a prelude that arranges an accident."""
    program = f"""
import os, signal, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
import runs
from meanflow import checkpoint, training
from pathlib import Path
try:
    from meanflow.cli import run
except ModuleNotFoundError:  # a GPU machine without tyro
    run = lambda main: sys.exit(main([]))
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
{prelude}
sys.argv[0] = "train.py"
run(lambda args: training.train(runs.tiny(**{train!r}), Path({str(out)!r})))
"""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=300)
