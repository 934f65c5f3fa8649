"""Small training runs for the tests, and runs that die."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fresh
import pytest
from safetensors.torch import load_file

from meanflow.presets import preset

STEPS, SAVE_EVERY = 10, 4


def tiny(name="digits", **train):
    """Digits by a tiny network; log intervals do not divide the checkpoints' so that a resume falls between them."""
    config = preset(name)
    heads = int(config.model.head_depth > 0)
    return replace(
        config,
        model=replace(config.model, depth=1 + heads, head_depth=heads, hidden_size=16, num_heads=1),
        train=replace(
            config.train,
            **{"steps": STEPS, "batch": 8, "log_every": 3, "save_every": SAVE_EVERY, "sample_every": 5, "keep_last": 2}
            | {"device": "cpu"}
            | train,
        ),
    )


def rung(name: str, **train):
    """A rung of improved MeanFlow's ladder, tiny, on digits."""
    config, wanted = tiny(**train), preset(f"ladder-{name}")
    model = {key: getattr(wanted.model, key) for key in ("conditioning", "guidance_input")}
    heads = int(wanted.model.head_depth > 0)
    model = replace(config.model, depth=1 + heads, head_depth=heads, **model)
    return replace(config, model=model, objective=replace(wanted.objective, share_equal=0.5))


GUIDED = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.75, "label_drop": 0.3, "share_equal": 0.5}


def guided(guidance_weights="current", implementation="native", **options):
    """The same with guidance, of the network that learns or of its average."""
    config = tiny(**options)
    told = config.objective.guidance_input != "none"
    guidance = {"label_drop": 0.3} if told else GUIDED | {"guidance_weights": guidance_weights}
    optim = replace(config.optim, implementation=implementation)
    return replace(config, objective=replace(config.objective, **guidance), optim=optim)


def curve(out: Path) -> list[dict]:
    """The log without what depends on the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    clocks = ("time", "images_per_second", "cpu_seconds", "data_wait", "memory_gb", "mfu")
    return [{key: row[key] for key in row if key not in clocks} for row in rows]


def assert_same_curve(out: Path, wanted: Path):
    """Two runs logged the same, but for rounding."""
    got, rows = curve(out), curve(wanted)
    assert [row["step"] for row in got] == [row["step"] for row in rows]
    for a, b in zip(got, rows, strict=True):
        assert a.keys() == b.keys()
        for name in {"raw", "raw_equal", "raw_unequal", "v_loss", "weight", "raw_v", "loss", "lr", "epoch"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-5), (a["step"], name)
        for name in {"grad_norm", "ema_distance", "du_dt_rms"} & b.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)


def final_state(out: Path) -> dict:
    """All tensors of the last checkpoint, bit for bit."""
    shards = max((out / "checkpoints").glob("step_????????")).glob("*.safetensors")
    return {name: x.numpy().tobytes() for shard in sorted(shards) for name, x in load_file(shard).items()}


def train_in_process(out: Path, prelude: str = "", ranks: int = 1, restarts: int = 0, **train):
    """Train the tiny run in processes of its own, after a prelude that arranges an accident; its CompletedProcess."""
    if ranks == 1:
        return fresh.run_forked(program(out, prelude, **train))
    job = start_processes(out, prelude, ranks, restarts, **train)
    try:
        stdout, stderr = job.communicate(timeout=300)
    finally:
        job.kill()
    return subprocess.CompletedProcess(job.args, job.returncode, stdout, stderr)


def program(out: Path, prelude: str = "", **train) -> str:
    """The text of a program that trains the tiny run."""
    return f"""
import os, signal, sys
RANK = int(os.environ.get("RANK", 0))
sys.path[:0] = {[p for p in sys.path if p]!r}
import runs
from meanflow.storage import checkpoint
from meanflow.training import trainer
from pathlib import Path
try:
    from meanflow.cli import run
except ModuleNotFoundError:  # a GPU machine without tyro
    run = lambda main: sys.exit(main([]))
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
OUT = Path({str(out)!r})
{prelude}
sys.argv[0] = "train.py"
run(lambda args: trainer.train(runs.tiny(**{train!r}), OUT))
"""


def start_processes(out: Path, prelude: str = "", ranks: int = 1, restarts: int = 0, **train) -> subprocess.Popen:
    """One process, or several under torchrun."""
    command = [sys.executable, "-c", program(out, prelude, **train)]
    if ranks > 1:
        script = out.with_name(out.name + ".py")
        script.write_text(command[-1])
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command += ["--monitor-interval", "0.2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
