"""A run in several processes is the run in one; what happens to it when processes die, lose data or come and go."""

import json
import os
import shutil
import signal
import time
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import runs
import torch
from ranks import train_guided, train_tiny

from meanflow.config import ObjectiveConfig
from meanflow.draws import Draws
from meanflow.errors import UserError
from meanflow.interop.weights import load_ema
from meanflow.method.microbatch import BatchSplit
from meanflow.method.times import draw_times, drop_mask, equal_prefix
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training.trainer import Trainer, train


def guided_steps(count: int) -> dict:
    return {"steps": count, "batch": 16, "log_every": 1, "save_every": count, "sample_every": 99, "groups": 2}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """So many steps of one process, by the preset's name."""

    @cache
    def run(name: str, steps: int) -> Path:
        out = tmp_path_factory.mktemp(f"{steps}-{name}")
        assert train(runs.guided(name=name, **guided_steps(steps)), out) == 0
        return out

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(runs.tiny(groups=2), out) == 0
    return out


SLOW = pytest.mark.slow
ENGINES = {
    "ddp": {"parallel": "ddp"},
    "zero1": {"parallel": "zero1"},
    "fsdp": {"parallel": "fsdp"},
    "hybrid": {"parallel": "hybrid", "shard_size": 1},
    "ddp, accumulated": {"parallel": "ddp", "accumulate": 2},
    "zero1, accumulated": {"parallel": "zero1", "accumulate": 2},
    "fsdp, accumulated": {"parallel": "fsdp", "accumulate": 4},
    "ddp, blocks computed again": {"parallel": "ddp", "checkpoint_blocks": True},
    "zero1, blocks computed again": {"parallel": "zero1", "checkpoint_blocks": True},
    "fsdp, blocks computed again": {"parallel": "fsdp", "checkpoint_blocks": True},
    "ddp, improved MeanFlow": {"parallel": "ddp", "accumulate": 2, "name": "digits-imf"},
    "zero1, improved MeanFlow": pytest.param({"parallel": "zero1", "accumulate": 2, "name": "digits-imf"}, marks=SLOW),
    "fsdp, improved MeanFlow": {"parallel": "fsdp", "name": "digits-imf"},
    "ddp, compiled": pytest.param({"parallel": "ddp", "compile": True}, marks=SLOW),
    "zero1, compiled": pytest.param({"parallel": "zero1", "compile": True}, marks=SLOW),
    "fsdp, compiled": pytest.param({"parallel": "fsdp", "compile": True}, marks=SLOW),
    "ddp, all": pytest.param(
        {"parallel": "ddp", "compile": True, "accumulate": 2, "checkpoint_blocks": True}, marks=SLOW
    ),
    "zero1, all": pytest.param(
        {"parallel": "zero1", "compile": True, "accumulate": 2, "checkpoint_blocks": True}, marks=SLOW
    ),
    "fsdp, all": pytest.param(
        {"parallel": "fsdp", "compile": True, "accumulate": 2, "checkpoint_blocks": True}, marks=SLOW
    ),
}


@pytest.mark.parametrize("steps", (6, pytest.param(20, marks=SLOW)))
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_steps_are_those_of_one_process(ranks, engine, steps, one_process, tmp_path):
    assert ranks(train_guided, str(tmp_path), guided_steps(steps) | engine) == [0, 0]
    one = one_process(engine.get("name", "digits"), steps)
    runs.assert_same_curve(tmp_path, one)
    # what the guard watches is of all processes
    for name in ("guard.means", "guard.good"):
        watched, wanted = (np.frombuffer(runs.final_state(out)[name]) for out in (tmp_path, one))
        np.testing.assert_allclose(watched, wanted, rtol=1e-4)


# --- the batch, split ---


@pytest.mark.parametrize("placement", ("first", "bernoulli"))
def test_a_batch_is_the_same_however_it_is_split(placement):
    config = ObjectiveConfig(equal_placement=placement, drop_placement=placement, label_drop=0.3)
    for groups in (1, 2, 4):
        found = {}
        for count in (1, 2, 4, 8):
            objective = MeanFlow(config, 32, groups, count)
            split, drawn = objective.split, [objective.drawn(3, 7, i) for i in range(count)]
            samples = torch.cat([split.samples(i) for i in range(count)])
            r, t, drop = map(torch.cat, zip(*(each[:3] for each in drawn), strict=True))
            order = samples.argsort()
            assert samples[order].tolist() == list(range(32))
            found[count] = torch.stack([r[order], t[order], drop[order].float()])
            for i in range(count):
                r, t, *_ = drawn[i]
                prefix = split.prefix(equal_prefix(config, split.group_size), i)
                assert torch.equal(r[:prefix], t[:prefix])
                if placement == "first":  # each micro-batch keeps its share
                    assert prefix == 24 // count and not torch.any(r[prefix:] == t[prefix:])
        assert all(torch.equal(x, found[1]) for x in found.values())


def test_a_group_is_an_official_device():
    """With a group a process, a process's samples are the official ones: its own, the first of them with r = t."""
    config = ObjectiveConfig(label_drop=0.3)
    objective = MeanFlow(config, 32, 4, 4)
    for rank in range(4):
        mine = torch.arange(8 * rank, 8 * (rank + 1))
        assert objective.split.samples(rank).tolist() == mine.tolist()
        draws = Draws(3, 7, mine)
        r, t, drop, _ = objective.drawn(3, 7, rank)
        assert torch.equal(torch.stack([r, t]), torch.stack(draw_times(config, draws)))
        assert torch.equal(drop, drop_mask(config, draws.uniform(4)))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((10, 1, 4), "train.batch: got 10, wanted a multiple of 4 .*take 12"),
        ((4, 1, 4), "train.batch: got 4, wanted .*take 8"),
        ((12, 5, 2), "train.groups: got 5, wanted a divisor of the batch 12"),
    ],
)
def test_a_batch_that_cannot_be_split(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        BatchSplit(*sizes)
    assert "\n" not in str(error.value)


def test_world_that_does_not_divide_the_batch(ranks, tmp_path):
    for message in ranks(refused, str(tmp_path), {"batch": 10, "accumulate": 3, "groups": 1}):
        assert message.startswith("train.batch: got 10, wanted a multiple of 6") and "\n" not in message


def refused(rank: int, out: str, options: dict) -> str:
    with pytest.raises(UserError) as error:
        train(runs.tiny(**options), Path(out))
    return str(error.value)


DIFFERENT = {
    "train.parallel: got 'ddp' in process 1, wanted 'zero1'": ({"parallel": "zero1"}, {"parallel": "ddp"}),
    "train.accumulate: got 2 in process 1, wanted 1": ({}, {"accumulate": 2}),
    "model.depth: got 2 in process 1, wanted 1": ({}, {"name": "digits-imf"}),
}


def refused_different(rank: int, out: str, options: tuple[dict, dict]) -> str:
    return refused(rank, out, options[rank])


@pytest.mark.parametrize("message, options", DIFFERENT.items())
def test_processes_with_different_options(ranks, message, options, tmp_path):
    for answer in ranks(refused_different, str(tmp_path), options):
        assert answer == f"{message}, as in process 0; start all with the same options"


# --- processes that come and go ---


@pytest.mark.parametrize("name", ("ddp", "zero1", "fsdp", "hybrid"))
def test_resume_on_fewer_and_on_more_processes(ranks, name, whole, tmp_path):
    """Two processes, one, two again: the steps, the data and the curve of one process all along."""
    engine = ENGINES[name]
    assert ranks(train_tiny, str(tmp_path), engine | {"groups": 2, "steps": 3}) == [0, 0]
    header = json.loads((tmp_path / "checkpoints" / "step_00000003" / "checkpoint.json").read_text())
    assert header["processes"] == 2
    assert train(runs.tiny(steps=6), tmp_path) == 0
    assert ranks(train_tiny, str(tmp_path), engine) == [0, 0]
    runs.assert_same_curve(tmp_path, whole)
    # the average is whole again in one process, and that of one process
    (net, *_), (wanted, *_) = load_ema(tmp_path, torch.device("cpu")), load_ema(whole, torch.device("cpu"))
    for a, b in zip(net.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_resume_as_another_kind(ranks, whole, tmp_path):
    for kind, steps in {"ddp": 3, "zero1": 6, "fsdp": 9}.items():
        assert ranks(train_tiny, str(tmp_path), {"parallel": kind, "groups": 2, "steps": steps}) == [0, 0]
    assert ranks(train_tiny, str(tmp_path), {"parallel": "zero1", "accumulate": 2}) == [0, 0]
    runs.assert_same_curve(tmp_path, whole)


# --- faults; a process dies at once by SIGKILL ---


def last_line(done, start: str) -> str:
    return next(line for line in reversed(done.stderr.splitlines()) if start in line)


FAULTS = {
    "one of two processes": (
        """
step = trainer.Trainer.train_step
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def train_step(self, *args):
    if RANK and first and self.step == 6:
        self.checkpointer.wait()  # the one of step 4
        die()
    step(self, *args)
trainer.Trainer.train_step = train_step
""",
        {},
    ),
    "one of two processes, before its shard is written": (
        """
write = checkpoint.dcp.HuggingFaceStorageWriter.write_data
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
checkpoint.dcp.HuggingFaceStorageWriter.write_data = (
    lambda self, *args: die() if RANK and first and "00000008" in str(self.path) else write(self, *args))
""",
        {"parallel": "fsdp"},
    ),
    "one of two processes, its shard half written": (
        """
def half(path):
    if RANK and first and "00000008" in str(path):
        os.truncate(path, path.stat().st_size // 2)
        die()
    return flush(path)
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
flush, checkpoint._flush = checkpoint._flush, half
""",
        {"parallel": "fsdp"},
    ),
    "the first of two, the checkpoint not yet named": (
        """
rename = os.rename
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
os.rename = lambda a, b: die() if first and "00000008" in str(b) else rename(a, b)
""",
        {"parallel": "ddp"},
    ),
}


@SLOW
@pytest.mark.parametrize("fault, options", FAULTS.values(), ids=FAULTS)
def test_fault_killed_and_restarted_by_torchrun(fault, options, whole, tmp_path):
    start = time.monotonic()
    done = runs.train_in_process(tmp_path, fault, ranks=2, restarts=1, groups=2, **options)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 4" in done.stdout
    runs.assert_same_curve(tmp_path, whole)
    assert not list(tmp_path.rglob("*.partial"))
    assert time.monotonic() - start < 120


@SLOW
def test_fault_an_exception_in_one_process_ends_the_job_with_its_traceback(tmp_path):
    fault = """
step = trainer.Trainer.train_step
def train_step(self, *args):
    if RANK and self.step == 2: raise RuntimeError("the cable was pulled")
    step(self, *args)
trainer.Trainer.train_step = train_step
"""
    done = runs.train_in_process(tmp_path, fault, ranks=2)
    assert done.returncode != 0
    assert "RuntimeError: the cable was pulled" in done.stderr and "in train_step" in done.stderr


def train_signalled(rank: int, out: str, options: dict) -> int:
    """Train; the second process gets a signal after its fourth step."""
    step = Trainer.train_step

    def train_step(self, *args):
        step(self, *args)
        if rank and self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(Trainer, "train_step", train_step):
        return train(runs.tiny(**options), Path(out))


def test_fault_a_signal_to_one_process_saves_and_stops_all(ranks, whole, tmp_path):
    assert ranks(train_signalled, str(tmp_path), {"groups": 2}) == [128 + signal.SIGTERM] * 2
    assert max(path.name for path in (tmp_path / "checkpoints").iterdir()) in ("step_00000005", "step_00000006")
    assert train(runs.tiny(groups=2), tmp_path) == 0
    runs.assert_same_curve(tmp_path, whole)


@SLOW
@pytest.mark.parametrize("full", (0, 1), ids=("the first", "the second"))
def test_fault_no_room_on_one_process(full, whole, tmp_path):
    # TensorBoard's events are 61 kB, the larger shard of a process 100
    limit = f"""
import resource
if RANK == {full}: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, resource.RLIM_INFINITY))
"""
    done = runs.train_in_process(tmp_path, limit, ranks=2, groups=2, parallel="fsdp")
    assert done.returncode != 0
    line = last_line(done, "error: checkpoint: got")
    assert "MiB free" in line and "step_00000004" in line
    assert not list(tmp_path.rglob("*.partial")) and not list((tmp_path / "checkpoints").iterdir())
    assert train(runs.tiny(groups=2), tmp_path) == 0
    runs.assert_same_curve(tmp_path, whole)


def test_fault_a_damaged_shard_of_two(ranks, whole, tmp_path):
    assert ranks(train_tiny, str(tmp_path), {"parallel": "fsdp", "steps": 8}) == [0, 0]
    shard = tmp_path / "checkpoints" / "step_00000008" / "shard-00002-model-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    assert ranks(train_tiny, str(tmp_path), {"parallel": "fsdp"}) == [0, 0]
    runs.assert_same_curve(tmp_path, whole)
    assert shard.parent.with_name("step_00000008.aside").exists()


def refused_nan(rank: int, out: str, options: dict) -> list:
    """Train with data that is not a number at some positions of the second process."""
    trainer = Trainer(runs.tiny(**options), Path(out))
    read = trainer.inputs

    def inputs(position):
        micro_batches = read(position)
        if rank == 1 and position in (2, 5):
            for inputs in micro_batches:
                inputs.batch.mean.fill_(float("nan"))
        return micro_batches

    trainer.inputs = inputs
    trainer.run()
    found = trainer.guard.findings()
    finite = all(
        x.isfinite().all() for x in (p.to_local() if hasattr(p, "to_local") else p for p in trainer.net.parameters())
    )
    return [found.skipped, found.in_a_row, finite]


@pytest.mark.parametrize("engine", ("ddp", "zero1", "fsdp"))
def test_fault_nan_on_one_process_is_left_out_by_all(ranks, engine, tmp_path):
    assert ranks(refused_nan, str(tmp_path), {"parallel": engine}) == [[2, 0, True]] * 2
    assert [row["skipped"] for row in runs.curve(tmp_path)] == [1, 1, 0, 0]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [3, 6]


@pytest.mark.parametrize("number", (signal.SIGTERM,))
@pytest.mark.slow
def test_fault_preemption_of_torchrun_itself(number, whole, tmp_path):
    """The agent gets the signal, as from Slurm; it passes it on."""
    slow = """
import time
step = trainer.Trainer.train_step
def train_step(self, *args):
    step(self, *args)
    print("STEP", self.step, flush=True)
    time.sleep(1)
trainer.Trainer.train_step = train_step
"""
    job = runs.start_processes(tmp_path, slow, ranks=2, groups=2)
    for line in job.stdout:
        if "STEP 2" in line:
            break
    start = time.monotonic()
    job.send_signal(number)
    out, _ = job.communicate(timeout=60)
    assert time.monotonic() - start < 60 and "stopped and saved at step" in out
    shutil.rmtree(tmp_path / "tensorboard")
    assert train(runs.tiny(groups=2), tmp_path) == 0
    runs.assert_same_curve(tmp_path, whole)
