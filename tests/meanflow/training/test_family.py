"""Runs of other objectives: levels of a batch's first samples, sets of samples that are dealt whole,
RAdam, levels and phases of a schedule over the run.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import runs
import torch

from meanflow.interop.weights import load_ema
from meanflow.training.trainer import Trainer, train

# small batches have both levels in each group, and short runs all grids and phases of the schedule
OBJECTIVES = {
    "digits-shortcut": {"bootstrap_every": 2, "timesteps": 4, "guide": True, "label_drop": 0.3},
    "digits-ict": {"s0": 2, "s1": 16},
    "digits-imm": {"label_drop": 0.3},
    "digits-alpha-flow": {"anneal_start": 0.2, "anneal_end": 0.8, "label_drop": 0.3, "omega": 0.2, "kappa": 0.9},
}
TINY = runs.tiny
SLOW = pytest.mark.slow
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "digits-alpha-flow" else ()) for name in OBJECTIVES]
)


def family(name: str, **train):
    """A tiny run."""
    run = TINY(name, **{"batch": 16, "groups": 2} | train)
    optim = replace(run.optim, algorithm="radam", implementation="torch") if name == "digits-ict" else run.optim
    return replace(run, objective=replace(run.objective, **OBJECTIVES[name]), optim=optim)


def train_family(rank: int, out: str, options: dict) -> int:
    return train(family(**options), Path(out))


def train_until(rank: int, out: str, options: dict, step: int) -> None:
    """Train to a step of a longer run, whose schedules depend on its length."""
    trainer = Trainer(family(**options), Path(out))
    trainer.run(stop=lambda: trainer.step >= step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in one process, uninterrupted, by its name."""

    @cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp(f"whole-{name}")
        assert train(family(name), out) == 0
        return out

    return run


@EACH
def test_killed_and_resumed(name, whole, tmp_path):
    prelude = """
import test_family
runs.tiny = test_family.family
step = trainer.Trainer.train_step
trainer.Trainer.train_step = lambda self, *args: die() if self.step == 6 else step(self, *args)
"""
    assert runs.train_in_process(tmp_path, prelude, name=name).returncode == -9
    assert train(family(name), tmp_path) == 0
    assert runs.final_state(tmp_path) == runs.final_state(whole(name))
    assert runs.curve(tmp_path) == runs.curve(whole(name))


ENGINES = {
    "ddp": {"parallel": "ddp"},
    "ddp, accumulated": {"parallel": "ddp", "accumulate": 2},
    "zero1": pytest.param({"parallel": "zero1"}, marks=SLOW),
    "fsdp": pytest.param({"parallel": "fsdp"}, marks=SLOW),
    "fsdp, accumulated": pytest.param({"parallel": "fsdp", "accumulate": 2}, marks=SLOW),
    "ddp, compiled": pytest.param({"parallel": "ddp", "compile": True}, marks=SLOW),
}


@EACH
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_two_processes_make_the_run_of_one(ranks, name, engine, whole, tmp_path):
    assert ranks(train_family, str(tmp_path), {"name": name} | engine) == [0, 0]
    runs.assert_same_curve(tmp_path, whole(name))


@EACH
def test_checkpoints_go_from_one_kind_to_another(ranks, name, whole, tmp_path):
    for kind, steps in {"ddp": 3, "fsdp": 5, "zero1": 8}.items():
        ranks(train_until, str(tmp_path), {"name": name, "parallel": kind}, steps)
    assert train(family(name), tmp_path) == 0
    runs.assert_same_curve(tmp_path, whole(name))
    (net, *_), (wanted, *_) = (load_ema(out, torch.device("cpu")) for out in (tmp_path, whole(name)))
    for a, b in zip(net.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
