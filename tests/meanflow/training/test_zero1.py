"""Zero1 is DDP to the last bit, and a process holds its part of the optimizer; processes that die or disagree."""

from pathlib import Path
from unittest import mock

import pytest
import runs
import torch
from ranks import Ranks, train_guided, train_tiny

from meanflow.errors import UserError
from meanflow.model.copies import kept_copies
from meanflow.storage import checkpoint as ckpt
from meanflow.training.engine import shard_optimizer
from meanflow.training.parallel import full_tensor
from meanflow.training.trainer import Trainer, train

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def four_ranks():
    processes = Ranks(4)
    yield processes
    processes.stop()


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer's state of the last checkpoint, whole."""
    path = ckpt.checkpoints(out / ckpt.FOLDER)[-1]
    parts = {part: ckpt.load_network(path, part) for part in ("model", "ema", "optimizer")}
    return {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}


BITS = {
    "fp32": pytest.param({}, marks=SLOW),
    "bf16": pytest.param({"precision": "bf16"}, marks=SLOW),
    "bf16, guided by the average": {"precision": "bf16", "guidance_weights": "ema"},
    "bf16, torch's optimizer": pytest.param({"precision": "bf16", "implementation": "torch"}, marks=SLOW),
    "bf16, compiled": pytest.param({"precision": "bf16", "compile": True}, marks=SLOW),
}


@pytest.mark.parametrize("options", BITS.values(), ids=BITS)
def test_zero1_is_ddp_to_the_last_bit(ranks, options, tmp_path):
    """Resumed as itself, and as DDP; of two processes both sum in one order."""
    work = train_tiny if "compile" in options else train_guided  # which has a dozen graphs
    for out, kinds in {"ddp": ("ddp", "ddp"), "zero1": ("zero1", "zero1"), "both": ("ddp", "zero1")}.items():
        for kind, steps in zip(kinds, (4, 6), strict=True):
            assert ranks(work, str(tmp_path / out), options | {"parallel": kind, "steps": steps}) == [0, 0]
    wanted, picture = weights_of(tmp_path / "ddp"), sorted((tmp_path / "ddp" / "samples").iterdir())[-1]
    for out in ("zero1", "both"):
        got = weights_of(tmp_path / out)
        assert got.keys() == wanted.keys()
        assert [name for name, x in got.items() if not torch.equal(x, wanted[name])] == []
        assert (tmp_path / out / "samples" / picture.name).read_bytes() == picture.read_bytes()


def looked_at(rank: int, out: str, options: dict) -> dict:
    """What a process of a run holds after three steps and a fourth, which is left out."""
    trainer = Trainer(runs.guided(**options), Path(out))
    net = trainer.make_step.loss.module.net
    for position in range(3):
        trainer.train_step(trainer.inputs(position))

    def held():
        state = [x for each in trainer.optimizer.state.values() for x in each.values()]
        return [x.clone() for x in (*rows, *state, *net.parameters(), *(kept.copy for kept in kept_copies(net)))]

    rows = [x.detach() for each in (trainer.net, trainer.ema) for x in map(local, each.parameters())]
    before, bad = held(), trainer.inputs(3)
    if rank == 1:
        for inputs in bad:
            inputs.batch.mean.fill_(float("nan"))
    trainer.train_step(bad)
    unchanged = all(x.equal(y) or y.isnan().all() for x, y in zip(before, held(), strict=True))

    whole = [full_tensor(p.detach()) for p in trainer.net.parameters()]
    by_parameter = dict(zip(net.parameters(), whole, strict=True))
    copies = {p: kept for kept in kept_copies(net) for p in kept.params}
    state = [x for each in trainer.optimizer.state.values() for name, x in each.items() if name != "step"]
    return {
        "skipped": trainer.guard.findings().skipped,
        "a left-out step changed nothing": unchanged,
        "copies are the rounded weights": all(
            kept.copy.equal(torch.cat([by_parameter[p] for p in kept.params]).bfloat16()) for kept in copies.values()
        ),
        "the others are the weights": all(p.equal(x) for p, x in by_parameter.items() if p not in copies),
        "copies": len(copies),
        "fp32 left of weights with a copy": sum(p.untyped_storage().nbytes() for p in copies) // 4,
        "share of the moments": sum(x.numel() for x in state) / sum(2 * x.numel() for x in whole),
        "share of weights and average": sum(x.numel() for x in rows) / sum(2 * x.numel() for x in whole),
    }


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def assert_looks_right(found: dict, count: int, low: bool):
    assert found["skipped"] == 1 and found["a left-out step changed nothing"]
    assert found["copies are the rounded weights"] and found["the others are the weights"]
    assert bool(found["copies"]) == low and found["fp32 left of weights with a copy"] == found["copies"]
    # but for a few tensors whose rows the processes do not divide
    for name in ("moments", "weights and average"):
        assert 1 / count <= found[f"share of the {name}" if name == "moments" else f"share of {name}"] < 1.1 / count


@pytest.mark.parametrize("name", ("digits", "digits-imf"))
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_what_a_process_of_zero1_holds(ranks, precision, name, tmp_path):
    for found in ranks(looked_at, str(tmp_path), {"parallel": "zero1", "precision": precision, "name": name}):
        assert_looks_right(found, 2, precision == "bf16")


@SLOW
@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_what_each_of_four_processes_of_zero1_holds(four_ranks, precision, tmp_path):
    for found in four_ranks(looked_at, str(tmp_path), {"parallel": "zero1", "precision": precision}):
        assert_looks_right(found, 4, precision == "bf16")


@SLOW
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "checkpoint_blocks": True}], ids=("", "accumulated"))
@pytest.mark.parametrize("name", ("digits", "digits-imf"))
def test_twenty_steps_of_four_processes_are_those_of_one(four_ranks, name, options, tmp_path):
    steps = {"steps": 20, "batch": 16, "log_every": 1, "save_every": 20, "sample_every": 99, "groups": 2, "name": name}
    assert train(runs.guided(**steps), tmp_path / "one") == 0
    assert four_ranks(train_guided, str(tmp_path / "four"), steps | {"parallel": "zero1"} | options) == [0] * 4
    runs.assert_same_curve(tmp_path / "four", tmp_path / "one")


def test_zero1_on_processes_that_cannot_share_a_weight():
    with mock.patch("torch.distributed.get_world_size", lambda: 3), pytest.raises(UserError) as error:
        shard_optimizer(runs.tiny(parallel="zero1"), *[None] * 5)
    assert str(error.value).startswith("processes: got 3, wanted a number that divides model.hidden_size 16")


# --- faults ---


FAULTS = {
    "its rows stepped but not gathered": """
from meanflow.training import parallel
gather, steps = parallel.OwnRows._gather, [0]
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
def gather_or_die(self):
    steps[0] += 1
    if RANK and first and steps[0] == 7:
        die()
    gather(self)
parallel.OwnRows._gather = gather_or_die
""",
    "before its rows are written": """
write = checkpoint.dcp.HuggingFaceStorageWriter.write_data
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
checkpoint.dcp.HuggingFaceStorageWriter.write_data = (
    lambda self, *args: die() if RANK and first and "00000008" in str(self.path) else write(self, *args))
""",
}


@SLOW
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_one_of_two_processes_killed(fault, tmp_path):
    assert train(runs.tiny(groups=2), tmp_path / "whole") == 0
    done = runs.train_in_process(tmp_path / "killed", fault, ranks=2, restarts=1, groups=2, parallel="zero1")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 4" in done.stdout
    runs.assert_same_curve(tmp_path / "killed", tmp_path / "whole")
    assert not list(tmp_path.rglob("*.partial"))
