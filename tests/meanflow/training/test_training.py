"""A run and its accidents: killed, stopped, out of room, not finite; the same command goes on bit for bit."""

import json
import os
import shutil
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from meanflow.errors import UserError
from meanflow.interop.weights import load_checkpoint
from meanflow.storage.checkpoint import save_weights
from meanflow.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert train(runs.tiny(), out) == 0
    return out


def same_run(out: Path, whole: Path) -> bool:
    return runs.curve(out) == runs.curve(whole) and runs.final_state(out) == runs.final_state(whole)


def test_what_a_run_leaves(whole):
    assert [row["step"] for row in runs.curve(whole)] == [3, 6, 9, 10]
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step_00000008", "step_00000010"}
    assert {p.name for p in (whole / "samples").iterdir()} == {"step_00000005.png", "step_00000010.png"}
    assert list((whole / "tensorboard").iterdir())
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["commit"]
    row = runs.curve(whole)[-1]
    assert row["loss"] == pytest.approx(1, abs=0.01) and row["raw"] > 10  # p = 1: the weighted loss says nothing


def test_two_runs_are_equal_and_seeds_matter(whole, tmp_path):
    train(runs.tiny(), tmp_path / "again")
    assert same_run(tmp_path / "again", whole)
    train(runs.tiny(seed=1), tmp_path / "other")
    assert runs.final_state(tmp_path / "other") != runs.final_state(whole)


# each is an accident at one moment; in all of them the process dies at once by SIGKILL
KILLS = {
    "between checkpoints": """
step = trainer.Trainer.train_step
trainer.Trainer.train_step = lambda self, *args: die() if self.step == 6 else step(self, *args)
""",
    "before a shard is written": """
write = checkpoint.dcp.HuggingFaceStorageWriter.write_data
checkpoint.dcp.HuggingFaceStorageWriter.write_data = (
    lambda self, *args: die() if "00000008" in str(self.path) else write(self, *args))
""",
    "half a shard written": """
def half(path):
    if "00000008" in str(path):
        os.truncate(path, path.stat().st_size // 2)
        die()
    return flush(path)
flush, checkpoint._flush = checkpoint._flush, half
""",
    "checkpoint written, not yet named": """
rename = os.rename
os.rename = lambda a, b: die() if "00000008" in str(b) else rename(a, b)
""",
    "checkpoint named, an old one half removed": """
def remove(path, **options):
    next(path.iterdir()).unlink()
    die()
checkpoint.shutil.rmtree = remove
""",
    "before the first checkpoint": """
trainer.Trainer.save = die
""",
}


@pytest.mark.parametrize("accident", KILLS.values(), ids=KILLS)
def test_killed_and_resumed(accident, whole, tmp_path):
    died = runs.train_in_process(tmp_path, accident)
    assert died.returncode == -signal.SIGKILL, died.stderr
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a kill in the middle of a line leaves it
    resumed = runs.train_in_process(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert same_run(tmp_path, whole)
    assert not list(tmp_path.rglob("*.partial"))


def test_improved_meanflow_is_killed_and_resumed(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train(runs.tiny("digits-imf"), whole) == 0
    died = runs.train_in_process(part, KILLS["between checkpoints"], name="digits-imf")
    assert died.returncode == -signal.SIGKILL, died.stderr
    resumed = runs.train_in_process(part, name="digits-imf")
    assert resumed.returncode == 0, resumed.stderr
    assert same_run(part, whole)
    # both losses are logged and watched, and each is weighted to about 1
    rows = runs.curve(whole)
    assert all(row["raw_v"] > 10 and row["weight_v"] == pytest.approx(row["raw_v"], rel=1e-3) for row in rows)
    assert rows[-1]["loss"] == pytest.approx(2, abs=0.01)
    assert len(np.frombuffer(runs.final_state(whole)["guard.means"])) == 4


def test_stopped_by_a_signal(whole, tmp_path):
    stop_at_5 = """
step = trainer.Trainer.train_step
def train_step(self, *args):
    step(self, *args)
    if self.step == 5: os.kill(os.getpid(), signal.SIGTERM)
trainer.Trainer.train_step = train_step
"""
    stopped = runs.train_in_process(tmp_path, stop_at_5)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "stopped and saved at step 5" in stopped.stdout
    assert (tmp_path / "checkpoints" / "step_00000005").exists()
    assert runs.train_in_process(tmp_path).returncode == 0
    assert same_run(tmp_path, whole)


@pytest.mark.gpu
def test_resumed_on_a_gpu(tmp_path):
    settings = {"device": "cuda", "deterministic": True}
    whole, part = tmp_path / "whole", tmp_path / "part"
    for out, steps in ((whole, runs.STEPS), (part, 6), (part, runs.STEPS)):
        done = runs.train_in_process(out, **settings, steps=steps)
        assert done.returncode == 0, done.stderr
    assert runs.final_state(part) == runs.final_state(whole)


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value is asked for: on a GPU the host waits for it, and nothing can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, precision", [("digits", "fp32"), ("digits", "bf16"), ("digits-imf", "bf16")])
def test_a_step_reads_no_values(name, precision, tmp_path):
    trainer = Trainer(runs.tiny(name, precision=precision), tmp_path)
    for step in range(2):
        inputs = trainer.inputs(step)
        with NoReads():
            trainer.train_step(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_step_does_not_wait_for_the_gpu(captured, tmp_path):
    trainer = Trainer(runs.tiny(device="cuda", cuda_graph=captured), tmp_path)
    trainer.train_step(trainer.inputs(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            trainer.train_step(trainer.inputs(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_longer_run_continues_a_shorter_one(whole, tmp_path):
    train(runs.tiny(steps=6, log_every=3), tmp_path)
    train(runs.tiny(), tmp_path)
    assert same_run(tmp_path, whole)


def test_finished_runs_are_left_alone(whole, capsys):
    before = runs.final_state(whole)
    assert train(runs.tiny(), whole) == 0
    assert "finished at step 10" in capsys.readouterr().out
    assert runs.final_state(whole) == before


def test_another_configuration_is_refused(whole):
    before = (whole / "config.json").read_text()
    with pytest.raises(UserError, match=r"train.batch: got 12, wanted 8, .* name another folder"):
        train(runs.tiny(batch=12), whole)
    with pytest.raises(UserError, match="train.steps: got 6, wanted at least the 10"):
        train(runs.tiny(steps=6), whole)
    assert (whole / "config.json").read_text() == before


def truncated(path):
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 100)


def flipped(path):
    with open(path / SHARD, "r+b") as file:
        file.seek(-50, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-50, os.SEEK_END)
        file.write(bytes([byte ^ 4]))


def lost(path):
    (path / SHARD).unlink()


def foreign(path):
    (path / "checkpoint.json").write_text('{"format": "of another project"}')


def text(path):
    (path / "checkpoint.json").write_text("not a checkpoint")


SHARD = "shard-00001-model-00002-of-00002.safetensors"
DAMAGES = [truncated, flipped, lost, foreign, text]


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_a_damaged_checkpoint_falls_back_to_the_one_before(damage, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "step_00000010"
    damage(last)
    held = {p.name: p.read_bytes() for p in last.iterdir()}
    assert train(runs.tiny(), tmp_path) == 0
    said = capsys.readouterr().out
    assert "checkpoint: got" in said and "resuming from step 8" in said
    assert same_run(tmp_path, whole)
    # nothing is lost
    assert {p.name: p.read_bytes() for p in last.with_name(last.name + ".aside").iterdir()} == held


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_no_checkpoint_is_intact(damage, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "step_00000010"
    shutil.rmtree(last.with_name("step_00000008"))
    damage(last)
    with pytest.raises(UserError, match="checkpoint: got .*step_00000010.*wanted") as error:
        train(runs.tiny(), tmp_path)
    assert "\n" not in str(error.value)
    shutil.rmtree(last)  # as the message says
    assert train(runs.tiny(), tmp_path) == 0
    assert same_run(tmp_path, whole)


def test_fault_a_checkpoint_of_another_model(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    config = runs.tiny()
    train(replace(config, model=replace(config.model, hidden_size=32)), tmp_path / "other")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    shutil.move(tmp_path / "other" / "checkpoints" / "step_00000010", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=r"step_00000010, which has .* of shape .*wanted one that fits") as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes the Linux way")
def test_no_room_for_a_checkpoint(whole, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))"
    full = runs.train_in_process(tmp_path, limit)
    assert full.returncode == 2
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: checkpoint: got") and "MiB free" in last
    assert not list(tmp_path.rglob("*.partial")) and not list((tmp_path / "checkpoints").glob("step*"))
    assert runs.train_in_process(tmp_path).returncode == 0
    assert same_run(tmp_path, whole)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="out: got .*file/run"):
        train(runs.tiny(), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


def test_bf16_stays_close_to_fp32(whole, tmp_path):
    train(runs.tiny(precision="bf16"), tmp_path)
    last = max((tmp_path / "checkpoints").iterdir())
    state = {name: x for shard in last.glob("*.safetensors") for name, x in load_file(shard).items()}
    assert {x.dtype for name, x in state.items() if name.startswith(("model", "ema"))} == {torch.float32}
    for a, b in zip(runs.curve(tmp_path), runs.curve(whole), strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=0.02) and a["raw"] != b["raw"]


def test_guidance_by_the_average(whole, tmp_path):
    config = runs.tiny()
    objective = replace(config.objective, omega=2.0, label_drop=0.1, guidance_weights="ema")
    train(replace(config, objective=objective), tmp_path / "ema")
    train(replace(config, objective=replace(objective, guidance_weights="current")), tmp_path / "current")
    assert runs.final_state(tmp_path / "ema") != runs.final_state(tmp_path / "current")


class Wandb(types.ModuleType):
    """Weights & Biases, as far as the log uses it."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.rows, self.ended = [], [], 0

    def init(self, **options):
        self.runs.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.ended += 1

    Image = staticmethod(lambda picture: picture.shape)


def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    for _ in range(2):
        assert train(runs.tiny(wandb="project"), tmp_path) == 0
        shutil.rmtree(tmp_path / "checkpoints")
    first, again = wandb.runs
    assert first["project"] == "project" and first["id"] == again["id"] and first["resume"] == "allow"
    assert first["config"]["train"]["batch"] == 8 and wandb.ended == 2
    steps = [step for step, values in wandb.rows if "train/raw" in values]
    assert steps == [3, 6, 9, 10] * 2
    assert [step for step, values in wandb.rows if "samples/one_step" in values] == [5, 10] * 2


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="train.wandb: got 'project', but its package is not installed"):
        train(runs.tiny(wandb="project"), tmp_path)


def test_some_checkpoints_are_kept_for_ever(tmp_path):
    train(runs.tiny(save_every=2, keep_last=1, keep_every=4), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]


def test_fine_tuning_begins_with_weights(whole, tmp_path):
    """Network and average begin as the run's average, from its folder or an exported file; resuming does not again."""
    weights, config, _, step = load_checkpoint(whole)
    save_weights(tmp_path / "exported.safetensors", weights, config, step)
    for source in (whole, tmp_path / "exported.safetensors"):
        out = tmp_path / f"of_{source.name}"
        trainer = Trainer(runs.tiny(init=str(source)), out)
        for net in (trainer.net, trainer.ema):
            assert all(torch.equal(x, weights[name]) for name, x in net.state_dict().items())
        assert trainer.step == 0
        assert train(runs.tiny(init=str(source), steps=6), out) == 0
    assert runs.curve(tmp_path / f"of_{whole.name}") == runs.curve(tmp_path / "of_exported.safetensors")
    (tmp_path / "exported.safetensors").unlink()
    assert train(runs.tiny(init=str(tmp_path / "exported.safetensors")), tmp_path / "of_exported.safetensors") == 0


def test_fine_tuning_from_what_does_not_fit(whole, tmp_path):
    config = runs.tiny(init=str(whole))
    with pytest.raises(UserError, match="which does not fit the model") as error:
        train(replace(config, model=replace(config.model, hidden_size=32)), tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="checkpoint: got .*missing, where there is none"):
        train(runs.tiny(init=str(tmp_path / "missing")), tmp_path / "run")
