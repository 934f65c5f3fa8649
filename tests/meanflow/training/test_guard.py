"""Steps that would do harm are not made, are counted, and are told; the run stops, or goes back."""

import json
from dataclasses import replace

import pytest
import runs
import torch

from meanflow.config import GuardConfig
from meanflow.errors import TrainingStopped
from meanflow.interop.weights import load_ema
from meanflow.training.guard import WARMUP_STEPS, SpikeGuard
from meanflow.training.trainer import Trainer

WATCHED = {"raw": "raw loss", "v_loss": "v_loss"}


def watched(raw=100.0, v_loss=50.0, grad_norm=1.0):
    return torch.tensor([raw, v_loss]), torch.tensor(grad_norm)


def feed(guard, steps, first=0, **values):
    return [float(guard.check(*watched(**values), torch.tensor(first + i))) for i in range(steps)]


@pytest.mark.parametrize("name", ["raw", "v_loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(name, value):
    guard = SpikeGuard(GuardConfig(), torch.device("cpu"), WATCHED)
    assert feed(guard, 2, **{name: value}) == [1, 1]
    assert feed(guard, 1, first=2) == [0]
    assert feed(guard, 2, first=3, **{name: value}) == [1, 1]
    found = guard.findings()
    assert (found.skipped, found.in_a_row, found.first) == (4, 2, 3)
    assert "not finite" in found.reason() and found.means == (100, 50, 1)


@pytest.mark.parametrize("name", ["raw", "v_loss", "grad_norm"])
def test_a_spike_is_left_out_once_there_is_a_mean(name):
    guard = SpikeGuard(GuardConfig(spike=5.0), torch.device("cpu"), WATCHED)
    usual = {"raw": 100.0, "v_loss": 50.0, "grad_norm": 1.0}[name]
    assert feed(guard, 1, **{name: 20 * usual}) == [0]  # too early to tell
    assert feed(guard, 2 * WARMUP_STEPS, first=1) == [0] * 2 * WARMUP_STEPS
    assert feed(guard, 1, **{name: 4.5 * usual}) == [0]
    assert feed(guard, 1, **{name: 6 * usual}) == [1]
    what = {"raw": "raw loss", "v_loss": "v_loss", "grad_norm": "gradient norm"}[name]
    assert guard.findings().reason().startswith(what) and "times its running mean" in guard.findings().reason()
    # what is left out does not move the mean
    assert feed(guard, 3, **{name: 6 * usual}) == [1, 1, 1]


def test_the_loss_of_v_is_watched_where_it_is_trained():
    guard = SpikeGuard(GuardConfig(spike=5.0), torch.device("cpu"), WATCHED | {"raw_v": "raw loss of v"})

    def check(raw_v):
        return float(guard.check(torch.tensor([100.0, 50.0, raw_v]), torch.tensor(1.0), torch.tensor(0)))

    assert check(float("nan")) == 1 and guard.findings().reason() == "raw loss of v not finite"
    assert [check(80.0) for _ in range(WARMUP_STEPS)] == [0] * WARMUP_STEPS and check(401.0) == 1
    assert guard.findings().reason().startswith("raw loss of v 401, 5.0 times")


def test_no_spikes_are_looked_for():
    guard = SpikeGuard(GuardConfig(spike=0.0), torch.device("cpu"), WATCHED)
    assert feed(guard, 2 * WARMUP_STEPS) == [0] * 2 * WARMUP_STEPS
    assert feed(guard, 1, raw=1e30) == [0] and feed(guard, 1, raw=float("nan")) == [1]


def test_the_mean_follows():
    guard = SpikeGuard(GuardConfig(), torch.device("cpu"), WATCHED)
    for i, raw in enumerate((1.0, 2.0, 3.0)):
        feed(guard, 1, first=i, raw=raw)
    assert guard.findings().means[0] == pytest.approx(2.0)  # at first the plain mean
    feed(guard, 2000, raw=7.0)
    assert guard.findings().means[0] == pytest.approx(7.0, rel=1e-3)


# --- in a run ---


def poisoned(out, positions, guard=None, implementation="native", **options):
    """A trainer whose data is not a number at some positions."""
    config = runs.tiny(**options)
    config = replace(config, optim=replace(config.optim, implementation=implementation))
    trainer = Trainer(replace(config, guard=GuardConfig(**(guard or {}))), out)
    read = trainer.inputs

    def inputs(position):
        micro_batches = read(position)
        if position in positions:
            for inputs in micro_batches:
                inputs.batch.mean[1].fill_(float("nan"))
        return micro_batches

    trainer.inputs = inputs
    return trainer


def events(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_fault_nan_is_left_out_and_counted(implementation, tmp_path):
    trainer = poisoned(tmp_path, {4}, implementation=implementation)
    before = []
    step = trainer.train_step

    def train_step(micro_batches):
        if trainer.step == 4:
            before.extend(p.detach().clone() for p in (*trainer.net.parameters(), *trainer.ema.parameters()))
        step(micro_batches)
        if trainer.step == 5:
            after = (*trainer.net.parameters(), *trainer.ema.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    trainer.train_step = train_step
    assert trainer.run() and before
    rows = runs.curve(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0]
    assert all(row["raw"] is not None and row["raw"] == row["raw"] for row in rows)
    (event,) = events(tmp_path)
    assert event["step"] == 6 and event["event"].startswith("1 step(s) left out, raw loss not finite")
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_fault_too_many_in_a_row_stop_the_run(tmp_path):
    trainer = poisoned(tmp_path, range(4, 99), {"patience": 3}, steps=40)
    with pytest.raises(
        TrainingStopped, match=r"5 steps in a row left out \(raw loss not finite\), from position 4"
    ) as stop:
        trainer.run()
    assert "step_00000004" in str(stop.value) and "seed 0" in str(stop.value) and "\n" not in str(stop.value)
    assert load_ema(tmp_path, torch.device("cpu"))[3] == 4  # the last good checkpoint is the last


def test_fault_roll_back_and_go_on_with_other_data(tmp_path):
    trainer = poisoned(tmp_path, range(5, 9), {"patience": 3, "then": "rollback"}, steps=12)
    seen = []
    step = trainer.train_step
    trainer.train_step = lambda micro_batches: (seen.append((trainer.step, trainer.position)), step(micro_batches))
    assert trainer.run()
    # steps 5 to 8 meet bad data; at step 9 the run goes back to the checkpoint of step 4, and on with position 9
    assert seen == [*((i, i) for i in range(9)), *((i, i + 5) for i in range(4, 12))]
    assert [row["step"] for row in runs.curve(tmp_path)] == [3, 6, 9, 12]
    assert [event["event"].split(",")[0] for event in events(tmp_path)][-1] == "back here from position 9"
    found = trainer.guard.findings()
    assert (found.skipped, found.in_a_row, found.rollbacks) == (4, 0, 1)
    # what was written in between is set aside, not lost
    assert (tmp_path / "checkpoints" / "step_00000008.aside").exists()
    header = json.loads((tmp_path / "checkpoints" / "step_00000012" / "checkpoint.json").read_text())
    assert header["position"] == 17


def test_fault_a_run_goes_back_so_often_and_no_more(tmp_path):
    trainer = poisoned(tmp_path, range(5, 99), {"patience": 3, "then": "rollback", "rollbacks": 2}, steps=40)
    with pytest.raises(TrainingStopped):
        trainer.run()
    assert trainer.guard.findings().rollbacks == 2


def test_rolled_back_runs_resume_where_they_were(tmp_path):
    """The position beyond the step is kept: killed later or not, the run is the same."""
    options = {"patience": 3, "then": "rollback"}
    assert poisoned(tmp_path / "whole", range(5, 9), options, steps=14).run()
    stopping = poisoned(tmp_path / "part", range(5, 9), options, steps=14)
    assert not stopping.run(lambda: stopping.step == 10)
    assert poisoned(tmp_path / "part", range(5, 9), options, steps=14).run()
    assert runs.curve(tmp_path / "part") == runs.curve(tmp_path / "whole")
    assert runs.final_state(tmp_path / "part") == runs.final_state(tmp_path / "whole")
