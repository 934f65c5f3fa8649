"""alpha-Flow against its equations in all phases, beside MeanFlow, in closed form, by its cost, and in the trainer."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import runs
import torch
from family_steps import F64, assert_near, batch, counted_forwards, forwards, gradients, in_f64, network
from torch import nn

from meanflow.config import ModelConfig
from meanflow.config_json import from_dict, to_dict
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method.contract import ObjectiveLoss
from meanflow.method.passes import Passes, func_jvp
from meanflow.objectives.alpha_flow import AlphaFlow, alpha_at
from meanflow.objectives.build import make_objective
from meanflow.objectives.meanflow import meanflow_terms
from meanflow.presets import preset
from meanflow.recipes.flow import AlphaFlowConfig
from meanflow.training.flops import sample_flops, step_flops
from meanflow.training.trainer import Trainer, train

SLOW = pytest.mark.slow
BASE = AlphaFlowConfig(
    anneal_start=0.2, anneal_end=0.8, omega=0.2, kappa=0.92, guidance_end=0.6, label_drop=0.3, share_equal=0.25
)
CONFIGS = {
    "guided": BASE,
    "unguided": replace(BASE, omega=1.0, kappa=0.0),
    "omega 1": replace(BASE, omega=1.0, kappa=0.5),
    "omega alone": replace(BASE, omega=2.0, kappa=0.0, guidance_start=0.3),
    "all labels": replace(BASE, label_drop=0.0, guidance_end=1.0),
    "no labels": replace(BASE, label_drop=1.0),
    "clipped": replace(BASE, clip=0.5, norm_c=0.1),
    "r = t alone": replace(BASE, share_equal=1.0),
    "r < t alone": replace(BASE, share_equal=0.0),
}
STEPS = {"trajectory": 0, "discrete": 5, "derivative": 9}
"""A step of each phase, of ten."""
CASES = [
    *(("guided", phase) for phase in STEPS),
    ("unguided", "derivative"), ("omega 1", "discrete"), ("omega alone", "derivative"), ("all labels", "trajectory"),
    ("no labels", "discrete"), ("clipped", "discrete"), ("clipped", "trajectory"), ("r = t alone", "discrete"),
    ("r < t alone", "derivative"),
]  # fmt: skip


def plain_loss(config: AlphaFlowConfig, net: nn.Module, x, e, y, drawn) -> torch.Tensor:
    """alpha-Flow, sample by sample, from the equations: every pass for every sample."""
    total, null = torch.zeros((), dtype=F64), torch.full((1,), net.num_classes)
    for i in range(len(x)):
        r, t, alpha = (a[i : i + 1] for a in (drawn.r, drawn.t, drawn.alpha))
        alpha, label = alpha.item(), null if drawn.drop[i] else y[i : i + 1]
        z, v = (1 - t) * x[i : i + 1] + t * e[i : i + 1], e[i : i + 1] - x[i : i + 1]
        with torch.no_grad():
            if config.guidance_start < t < config.guidance_end:
                omega, kappa = config.omega, config.kappa
                v = omega * v + kappa * net(z, t, t, label) + (1 - omega - kappa) * net(z, t, t, null)
            delta, target = alpha * (t - r), v
            if r < t and alpha == 0:
                _, du_dt = torch.func.jvp(
                    lambda z, r, t, label=label: net(z, r, t, label), (z, r, t), (v, 0 * r, 1 + 0 * t)
                )
                target = v - (t - r) * du_dt
            elif r < t:
                later = net(z - delta * v, r, t - delta, label)
                target = ((delta * v + (t - delta - r) * later) / (t - r)).clamp(-config.clip, config.clip)
        mse = (net(z, r, t, label) - target).square().mean()
        factor = 1 if r == t or alpha == 0 else alpha
        total = total + factor * mse / (mse.detach() + config.norm_c)
    return total / len(x)


def of_phase(config: AlphaFlowConfig, step: int, size: int = 12, **split: int) -> tuple:
    """The objective, and what it draws for each micro-batch of a step."""
    objective = AlphaFlow(config, size, steps=10, **split)
    return objective, [in_f64(objective.drawn(3, step, each)) for each in range(split.get("micro_batches", 1))]


@pytest.mark.parametrize("name, phase", CASES, ids=map(", ".join, CASES))
def test_planned_step_is_the_plain_one(name, phase):
    config, net, (x, e, y) = CONFIGS[name], network(time_embedding=("t", "r")), batch(8)
    objective, (drawn,) = of_phase(config, STEPS[phase], 8)
    wanted = plain_loss(config, net, x, e, y, drawn)
    gradient = gradients(wanted, net)
    for exact in (False, True):
        got = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn, exact=exact)).loss
        assert_near(got.detach(), wanted.detach())
        assert_near(gradients(got, net), gradient)


@pytest.mark.parametrize("phase", ["discrete", "derivative"])
def test_micro_batches_of_uneven_groups(phase):
    """A sample with r = t among those that may have r < t."""
    config, net, (x, e, y) = replace(BASE, share_equal=0.4), network(), batch(12)
    objective, parts = of_phase(config, STEPS[phase], 24, groups=3, micro_batches=2)
    assert len({int((drawn.r == drawn.t).sum()) for drawn in parts}) == 2
    for drawn in parts:
        terms = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn, *parts))
        wanted, sums = plain_loss(config, net, x, e, y, drawn), objective.sums(terms)
        assert_near(terms.loss.detach(), wanted.detach())
        assert_near(gradients(terms.loss, net), gradients(wanted, net))
        for name, of in {"raw_equal": drawn.r == drawn.t, "raw_unequal": drawn.r < drawn.t}.items():
            assert_near(sums[name], terms.raw[of].sum())
            assert sums[f"{name}_samples"] == of.sum()


@pytest.mark.parametrize("config", [CONFIGS["unguided"], CONFIGS["all labels"]], ids=["unguided", "guided"])
def test_the_last_phase_is_meanflow(config):
    """Where all labels are kept, with its constant times the elements: raw is a mean here, there a sum."""
    config = replace(config, label_drop=0.0)
    net, (x, e, y) = network(), batch(12)
    objective, (drawn,) = of_phase(config, STEPS["derivative"])
    terms = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn))
    elements = x[0].numel()
    shared = replace(config.meanflow(), norm_c=config.norm_c * elements)
    wanted = meanflow_terms(shared, net, x, e, drawn.r, drawn.t, y, drawn.drop)
    assert_near(terms.raw, wanted.raw / elements, 1e-12)
    assert_near(terms.u_tgt, wanted.u_tgt, 1e-12)
    assert_near(terms.loss.detach(), wanted.loss.detach(), 1e-12)
    assert_near(gradients(terms.loss, net), gradients(wanted.loss, net), 1e-12)


# --- a flow known in closed form ---


class Gaussian(nn.Module):
    """u of data N(0.7, 0.4^2): their flow keeps each sample's place among them."""

    num_classes = 1

    def sigma(self, t):
        return ((1 - t) ** 2 * 0.4**2 + t**2).sqrt()

    def velocity(self, z, t):
        return -0.7 + (t - (1 - t) * 0.4**2) / self.sigma(t) ** 2 * (z - (1 - t) * 0.7)

    def forward(self, z, r, t, y):
        r, t = (a.reshape(-1, 1, 1, 1) for a in (r, t))
        there = (1 - r) * 0.7 + self.sigma(r) / self.sigma(t) * (z - (1 - t) * 0.7)
        gap = torch.where(t == r, 1, t - r)
        return torch.where(t == r, self.velocity(z, t), (z - there) / gap)


def residual(alpha: float) -> torch.Tensor:
    """Root of raw (B,) of the known flow, data and noise along it: e - x is the marginal velocity at z."""
    net, config = Gaussian(), replace(BASE, omega=1.0, kappa=0.0, share_equal=0.0, clip=100.0)
    objective, (drawn,) = of_phase(config, STEPS["derivative"] if alpha == 0 else STEPS["discrete"], 8)
    z, t = batch(8)[0], torch.linspace(0.3, 0.95, 8, dtype=F64)
    v = net.velocity(z, t[:, None, None, None])
    x, e = z - t[:, None, None, None] * v, z + (1 - t[:, None, None, None]) * v
    drawn = drawn._replace(t=t, r=0.3 * t, alpha=torch.full_like(t, alpha))
    plan = objective.plan(drawn)
    passes = Passes(objective.passes(plan.sizes), net, jvp=func_jvp)
    return objective.terms(passes, x, e, torch.zeros(8).long(), drawn, plan).raw.sqrt()


def test_a_known_flow_has_no_residual():
    """With the derivative none at all; with a step of alpha (t - r) along the tangent one of second order in it, over
    t - r.
    """
    assert residual(0.0).max() < 1e-13
    one, tenth = residual(1e-3), residual(1e-4)
    assert (one < 1e-3).all()
    torch.testing.assert_close(one / tenth, torch.full_like(one, 100.0), rtol=0.05, atol=0)
    assert residual(0.5).min() > 1e-3


# --- schedule, draws, cost, options ---


def test_schedule():
    config = AlphaFlowConfig()

    def of(step: int) -> float:
        return alpha_at(config, step, 1_200_000)

    alphas = {step: of(step) for step in range(0, 1_200_001, 1000)}
    assert list(alphas.values()) == sorted(alphas.values(), reverse=True)
    assert alphas[800_000] == 0.5 and of(840_000) == pytest.approx(1 / (1 + np.exp(2.5)), rel=1e-12)
    # where the sigmoid is within 0.005 of its ends
    bend = log(199) / 25 * 400_000
    assert of(int(800_000 - bend)) == 1 and 0 < of(int(800_000 - bend) + 2) < 1
    assert of(int(800_000 + bend) + 1) == 0 < of(int(800_000 + bend) - 1)
    at_once = AlphaFlowConfig(anneal_start=0.5, anneal_end=0.5)
    assert [alpha_at(at_once, step, 10) for step in (0, 4, 5, 6)] == [1, 1, 0, 0]


def test_draws():
    config = replace(BASE, label_drop=0.1, guidance_start=0.3)
    objective = AlphaFlow(config, 4096, steps=10)
    drawn, draws = objective.drawn(5, 5, 0), Draws(5, 5, torch.arange(4096))
    inside = (drawn.t > 0.3) & (drawn.t < 0.6)
    assert torch.equal(drawn.drop, (draws.uniform(Purpose.LABEL_DROP) < 0.1) & inside) and drawn.drop.any()
    a, b = ((draws.normal(purpose) - 0.4).sigmoid() for purpose in (Purpose.TIME_A, Purpose.TIME_B))
    assert torch.equal(drawn.t, torch.maximum(a, b)) and torch.equal(drawn.r[1024:], torch.minimum(a, b)[1024:])
    assert torch.equal(drawn.r[:1024], drawn.t[:1024]) and (drawn.alpha == 0.5).all()
    # where the guard went back, positions are beyond the run, whose phases alone are declared
    late = AlphaFlow(replace(config, anneal_start=0.9, anneal_end=1.0), 12, steps=10)
    assert (late.drawn(5, 30, 0).alpha == 1).all() and late.plan(late.drawn(5, 30, 0)).sizes in late.declared
    # of a dropped label with omega 1 nothing is left to predict
    plain = AlphaFlow(replace(config, omega=1.0), 4096, steps=10)
    others, nearer = inside & ~drawn.drop, torch.arange(4096) >= 1024
    assert plain.need(drawn, (0, 0)) == others.sum() + (others & nearer).sum()
    assert objective.need(drawn, (0, 0)) == inside.sum() + (others & nearer).sum()


@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("phase, more", {"trajectory": 0.0, "discrete": 0.5, "derivative": 0.5}.items())
def test_what_a_step_costs(phase, more, size):
    """Three forward passes, those of the predictions and of the phase, and at most .07 for padding."""
    model = replace(ModelConfig.official("B/4"), depth=4, time_embedding="t,r")
    config = replace(BASE, share_equal=0.5, guidance_end=0.75, label_drop=0.1, anneal_start=0.2, anneal_end=0.8)
    objective = AlphaFlow(config, size, steps=1000)
    assert len(objective.declared) <= 32
    first = {"trajectory": 0, "discrete": 450, "derivative": 900}[phase]
    drawn = [objective.drawn(0, step, 0) for step in range(first, first + 50)]
    planned = [objective.sizes(each) for each in drawn]
    assert set(planned) <= set(objective.declared)
    padded = np.mean([forwards(objective, model, sizes) for sizes in planned])
    exact = np.mean([forwards(objective, model, objective.sizes(each, exact=True)) for each in drawn])
    inside = 0.5 * (1 + torch.erf(torch.tensor((log(3) + 0.4) / 2**0.5))).item()
    predicted = inside**2 * (1 + 0.9 * 0.5)
    assert exact == pytest.approx(3 + predicted + more, abs=0.08)
    assert 4 < padded <= exact + 0.07 and padded < 6
    if size == 32:
        counted = counted_forwards(objective, model, planned[0])
        assert counted == pytest.approx(forwards(objective, model, planned[0]), rel=1e-9)


def test_the_mean_cost_of_a_step_is_that_of_all_phases():
    """Of digits: alpha falls from the half of the run to five sixths, and half of the samples have r < t."""
    run = preset("digits-alpha-flow")
    objective, flops = make_objective(run), sample_flops(run.model)
    bend = log(199) / 25 * 600
    share = (1800 - 1200 + bend) / 1800
    tangent = 0.5 * flops.tangent / flops.forward
    discrete = 2 * bend / 1800
    wanted = flops.of_passes(objective.passes((0, 0, 0))) / (64 * flops.forward)
    wanted += 0.5 * discrete + tangent * (share - discrete)
    assert step_flops(run.model, objective) / (64 * flops.forward) == pytest.approx(wanted, abs=0.03)


def test_only_phases_that_a_run_comes_to_are_declared():
    def phases(start: float, end: float) -> set:
        config = replace(BASE, anneal_start=start, anneal_end=end)
        return {sizes[:2] for sizes in AlphaFlow(config, 12, steps=100).declared}

    trajectory, discrete, derivative = (0, 0), (0, 9), (9, 0)
    assert phases(0.2, 0.8) == {trajectory, discrete, derivative}
    assert phases(1.0, 1.0) == {trajectory} and phases(0.0, 0.0) == {derivative}
    assert phases(0.5, 1.0) == {trajectory, discrete, derivative} and phases(0.99, 1.0) == {trajectory}


WRONG = {
    "anneal_start": -0.1, "anneal_end": 0.1, "clip": 0.0, "norm_c": 0.0, "share_equal": 1.5, "time_std": 0.0,
    "kappa": 1.0, "omega": float("inf"), "guidance_start": 0.7, "label_drop": -0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(name):
    with pytest.raises(UserError, match=f"^objective.{name}: got ") as error:
        replace(BASE, **{name: WRONG[name]})
    assert "\n" not in str(error.value)


def test_a_batch_that_the_share_does_not_divide_is_refused():
    run = runs.tiny("digits-alpha-flow")
    with pytest.raises(UserError, match="train.batch: got 3, wanted one that a share of r = t of 0.5 divides"):
        replace(run, train=replace(run.train, batch=3))


# --- what the trainer makes of it ---


def config(**options):
    run = runs.tiny("digits-alpha-flow", **options)
    return replace(run, objective=replace(BASE, share_equal=0.5))


def test_a_run_goes_through_its_phases_and_resumes(tmp_path):
    run = config(log_every=1)
    assert from_dict(to_dict(run)) == run and to_dict(run)["objective"]["kind"] == "alpha-flow"
    train(run, tmp_path / "whole")
    rows = runs.curve(tmp_path / "whole")
    assert [row["alpha"] for row in rows] == pytest.approx([alpha_at(run.objective, step, 10) for step in range(10)])
    assert rows[0]["alpha"] == 1 and rows[5]["alpha"] == 0.5 and rows[-1]["alpha"] == 0
    assert all(row["raw_equal"] > 0 and row["raw_unequal"] > 0 and row["skipped"] == 0 for row in rows)
    Trainer(run, tmp_path / "cut").run(stop=iter([False] * 5 + [True]).__next__)
    train(run, tmp_path / "cut")
    assert runs.final_state(tmp_path / "cut") == runs.final_state(tmp_path / "whole")


@SLOW
def test_all_phases_are_compiled_before_the_first_step(tmp_path):
    """A step that compiled anew would fail."""
    compiled, plain = (Trainer(config(compile=on), tmp_path / str(on)) for on in (True, False))
    for trainer in (compiled, plain):
        trainer.found = [
            trainer.make_step(*trainer.inputs(position)).terms[0].loss.item() for position in (0, 5, 9, 1, 4, 8)
        ]
    assert compiled.found == pytest.approx(plain.found, rel=1e-4)
