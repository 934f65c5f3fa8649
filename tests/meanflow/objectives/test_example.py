"""An objective from nothing: two half steps of the average teach one whole step. What the trainer makes of it."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import runs
import torch
from torch import Tensor

from benchmarks.counting.accounts import MetaStep, account, count
from meanflow.config_json import from_dict, to_dict
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError, require
from meanflow.method.contract import Objective, Sizes
from meanflow.method.passes import Pass, Passes
from meanflow.objective_options import ObjectiveOptions
from meanflow.objectives import build
from meanflow.presets import PRESETS
from meanflow.training.flops import sample_flops
from meanflow.training.trainer import Trainer, train


@dataclass(frozen=True)
class HalfStepsConfig(ObjectiveOptions, kind="half-steps"):
    """Options of the example."""

    begin: float = 0.5
    """Share of the run after which two samples of each set of four learn whole steps."""

    def __post_init__(self):
        require(0 <= self.begin <= 1, "objective.begin", self.begin, "a number in [0, 1]", "change it")


class Drawn(NamedTuple):
    """What is drawn beside data and noise."""

    t: Tensor
    """Times (B,), the same in a set."""
    whole: Tensor
    """Who learns a whole step (B,) bool; the others learn the velocity."""


class Plan(NamedTuple):
    """Which sample needs which pass."""

    whole: Tensor
    """Those who learn a whole step (n,) int64."""

    @property
    def sizes(self) -> Sizes:
        return (len(self.whole),)


class Terms(NamedTuple):
    """Results of a batch."""

    loss: Tensor
    raw: Tensor
    """Squared error of a sample (B,)."""
    raw_whole: Tensor
    """Of those who learn a whole step (n,)."""


class HalfSteps(Objective):
    """u(z, 0, t) of half the samples = the mean of two half steps by the average; of the others u(z, t, t) = e - x."""

    set_size = 4
    watched = {"raw": "raw loss"}
    logged = ("raw", "raw_whole")

    def draw(self, draws: Draws) -> Drawn:
        of_set = Draws(draws.seed, draws.step, draws.samples - draws.samples % self.set_size)
        whole = (draws.samples % 4 < 2) & (draws.step >= self.config.begin * self.steps)
        return Drawn(0.1 + 0.9 * of_set.uniform(Purpose.TIME_A), whole)

    @property
    def declared(self) -> tuple[Sizes, ...]:
        # two phases
        return ((self.batch // 2,), (0,))

    def need(self, drawn: Drawn, sizes: Sizes) -> int:
        return int(drawn.whole.sum())

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        return Plan(drawn.whole.nonzero().flatten())

    def example(self, sizes: Sizes) -> Plan:
        return Plan(torch.arange(sizes[0]))

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        half_step = Pass(sizes[0], weights="average", precision="fp32")
        return {"first": half_step, "second": half_step, "trained": Pass(self.batch, trained=True)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> Terms:
        t, whole = drawn.t, plan.whole
        z, target = x + t[:, None, None, None] * (e - x), e - x
        if len(whole):
            z_t, t_, y_ = z[whole], t[whole], y[whole]
            half = t_ / 2
            u_1 = passes("first", z_t, half, t_, y_)
            u_2 = passes("second", z_t - half[:, None, None, None] * u_1, torch.zeros_like(half), half, y_)
            target = target.index_copy(0, whole, (u_1 + u_2) / 2)
        r = t.index_fill(0, whole, 0.0)
        raw = (passes("trained", z, r, t, y) - target).square().flatten(1).sum(1)
        return Terms(raw.mean(), raw.detach(), raw.detach()[whole])


# --- what the trainer makes of it ---


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(build.OBJECTIVES, HalfStepsConfig, HalfSteps)


def config(**train):
    return replace(runs.tiny(batch=16, **train), objective=HalfStepsConfig())


def shake(trainer):
    """Give the average weights of its own, none of them zero."""
    for net, std in ((trainer.net, 0.1), (trainer.ema, 0.2)):
        state = net.state_dict()
        for p in (state[name] for name, _ in net.named_parameters()):
            p.copy_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        # loading renews low-precision copies
        net.load_state_dict(state)


def plainly(trainer, inputs):
    """The loss of a batch, written sample by sample for fp32."""
    x, e = trainer.make_step._draw(inputs.batch, inputs.samples, inputs.step)
    losses = []
    for i, (t, whole) in enumerate(zip(*inputs.drawn, strict=True)):
        y, target = inputs.batch.labels[i : i + 1], e[i : i + 1] - x[i : i + 1]
        z, t = x[i : i + 1] + t * target, t[None]
        if whole:
            with torch.no_grad():
                first = trainer.ema(z, t / 2, t, y)
                target = (first + trainer.ema(z - t / 2 * first, 0 * t, t / 2, y)) / 2
        losses.append((trainer.net(z, t * ~whole, t, y) - target).square().sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_are_the_objective_written_plainly(precision, tmp_path):
    trainer, seen = Trainer(config(precision=precision), tmp_path), []
    for name, net in (("net", trainer.net), ("ema", trainer.ema)):
        net.blocks[0].attn.qkv.register_forward_hook(
            lambda _, args, out, name=name: seen.append((name, out[0].primal.dtype, torch.is_grad_enabled()))
        )
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    # targets come from the average, in fp32 and without a gradient
    targets, trained = [("ema", torch.float32, False)] * 2, [("net", low, True)]
    for position, size, wanted in ((0, 0, trained), (9, 8, targets + trained)):
        (inputs,) = trainer.inputs(position)
        assert inputs.plan.sizes == inputs.needed == (size,)
        shake(trainer)
        loss = plainly(trainer, inputs).item()
        seen.clear()
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        assert trainer.make_step(inputs).terms[0].loss.item() == pytest.approx(loss, rel=tolerance)
        assert seen == wanted


def test_sets_are_dealt_whole():
    objective = HalfSteps(HalfStepsConfig(), 64, groups=2, micro_batches=4, steps=10)
    found = torch.cat([objective.split.samples(i) for i in range(4)])
    assert found.sort().values.tolist() == list(range(64))
    assert (found.reshape(-1, 4) == found[::4, None] + torch.arange(4)).all()
    whole = HalfSteps(HalfStepsConfig(), 64, steps=10).drawn(3, 7, 0)
    for i in range(4):
        drawn = objective.drawn(3, 7, i)
        assert torch.equal(drawn.t, whole.t[objective.split.samples(i)])
        assert len(drawn.t.unique()) == 4 and objective.plan(drawn).sizes == (8,)
    with pytest.raises(
        UserError, match=r"train.batch: got 24, wanted a multiple of 16 .* the 4 samples of a set.*take 32"
    ):
        HalfSteps(HalfStepsConfig(), 24, micro_batches=4)


def test_both_phases_are_compiled_before_the_first_step(tmp_path, monkeypatch):
    # all but the C++ of each kernel, which costs a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled, plain = (Trainer(config(compile=on), tmp_path / str(on)) for on in (True, False))
    for trainer in (compiled, plain):
        shake(trainer)
        for position in (0, 7, 1):
            done = trainer.make_step(*trainer.inputs(position))
            trainer.found = [*getattr(trainer, "found", []), done.terms[0].loss.item()]
    assert compiled.found == pytest.approx(plain.found, rel=1e-4)
    (inputs,) = compiled.inputs(9)
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        compiled.make_step(inputs._replace(plan=Plan(torch.arange(4))))


def test_a_run_is_trained_logged_and_resumed(tmp_path):
    train(config(), tmp_path / "whole")
    train(config(steps=6), tmp_path / "part")
    # the schedule is that of the run's length
    assert "raw_whole" in runs.curve(tmp_path / "part")[0]
    rows = runs.curve(tmp_path / "whole")
    assert [row["raw_whole"] is None for row in rows] == [True, False, False, False]
    assert all(row["raw"] > 0 and "du_dt_rms" not in row for row in rows)
    half = config()
    Trainer(half, tmp_path / "half").run(stop=iter([False] * 4 + [True]).__next__)
    train(half, tmp_path / "half")
    assert runs.final_state(tmp_path / "half") == runs.final_state(tmp_path / "whole")
    assert from_dict(to_dict(half)) == half and to_dict(half)["objective"] == {"kind": "half-steps", "begin": 0.5}


def test_work_is_counted_from_the_declaration():
    run = config()
    step = MetaStep(run)
    accounts = account(run, batches=10)
    parts = accounts["parts"]
    assert list(parts) == ["first", "second", "primal", "tangent", "backward"]
    # half of the steps make two passes of half the batch: a quarter of a forward each
    assert parts["first"]["forwards"] == parts["second"]["forwards"] == pytest.approx(0.25)
    assert parts["primal"]["forwards"] == 1 and parts["tangent"]["flops"] == 0
    for sizes in step.objective.declared:
        plan = step.objective.example(sizes)
        counted = count(lambda plan=plan: step.loss(plan).backward()).total
        found = sample_flops(run.model).of_passes(step.objective.passes(sizes))
        assert found == pytest.approx(counted, rel=1e-12)


def test_presets_declare_few_sizes():
    for name, each in PRESETS.items():
        declared = build.make_objective(each.config()).declared
        assert len(declared) <= 32 and list(declared) == sorted(set(declared), reverse=True), name


BROKEN = {  # what is called differently from its declaration
    "not declared": ({"second": None}, "got 'second', wanted 'trained'"),
    "never made": ({"third": Pass(4)}, "third"),
    "other rows": ({"first": Pass(4)}, "'first': got 8 rows"),
    "in another order": ({"second": "first"}, "got 'first', wanted 'second'"),
}


@pytest.mark.parametrize("changes, message", BROKEN.values(), ids=BROKEN)
def test_a_pass_that_is_not_declared_fails(changes, message, tmp_path, monkeypatch):
    trainer = Trainer(config(), tmp_path)
    declared = HalfSteps.passes

    def broken(self, sizes):
        found = declared(self, sizes)
        for name, change in changes.items():
            if change is None:
                del found[name]
            elif isinstance(change, Pass):
                found[name] = change
            else:
                found = {name: found[name]} | found
        return found

    monkeypatch.setattr(HalfSteps, "passes", broken)
    with pytest.raises(ValueError, match=message):
        trainer.make_step(*trainer.inputs(9))
