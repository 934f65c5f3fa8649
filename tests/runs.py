"""Small training runs for the tests, and runs that die."""

import json
import os
import subprocess
import sys
import tempfile
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
    clocks = ("time", "images_per_second", "data_wait", "memory_gb", "mfu")
    return [{key: row[key] for key in row if key not in clocks} for row in rows]


def final_state(out: Path) -> dict:
    """All tensors of the last checkpoint, bit for bit."""
    shards = max((out / "checkpoints").glob("step_????????")).glob("*.safetensors")
    return {name: x.numpy().tobytes() for shard in sorted(shards) for name, x in load_file(shard).items()}


def train_in_process(out: Path, prelude: str = "", ranks: int = 1, **train) -> subprocess.CompletedProcess:
    """Train the tiny run in processes of its own, after a prelude that arranges an accident; several under torchrun."""
    program = f"""
import os, signal, sys
RANK = int(os.environ.get("RANK", 0))
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
    command = [sys.executable, "-c", program]
    if ranks > 1:
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(program)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                   "--rdzv-endpoint", "127.0.0.1:0", file.name]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
