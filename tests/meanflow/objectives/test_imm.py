"""Inductive moment matching against its equations, in closed form, by its cost, and what the trainer makes of it."""

from dataclasses import replace
from math import exp, log, sqrt
from types import SimpleNamespace

import pytest
import runs
import torch
from family_steps import F64, assert_near, batch, counted_forwards, forwards, gradients, network
from torch import nn

from meanflow.config import ModelConfig
from meanflow.config_json import from_dict, to_dict
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.interop import convert
from meanflow.method.contract import ObjectiveLoss
from meanflow.method.passes import Passes
from meanflow.method.sampling import even_times, sample
from meanflow.method.views import view_of
from meanflow.objectives.imm import Drawn, Imm, arrange_times, weight
from meanflow.recipes.consistency import ImmConfig
from meanflow.training.engine import check
from meanflow.training.trainer import Trainer, train

BASE = ImmConfig(label_drop=0.3)
CONFIGS = {
    "official": (BASE, ("t", "r")),
    "stride": (BASE, ("t", "h")),
    "cifar": (replace(BASE, t_min=0.006, time_law="log_normal", gap_power=15, weight_b=5.0), ("t", "r")),
    "several steps": (replace(BASE, weight_a=2.0, sigma_data=1.3), ("t", "r")),
    "far targets": (replace(BASE, gap_power=7), ("t", "r")),
    "pairs": (replace(BASE, set_size=2, label_drop=0.0), ("t", "r")),
}


def plain_loss(config: ImmConfig, net: nn.Module, x, e, y, drawn: Drawn) -> torch.Tensor:
    """IMM from the paper's equations, in its own scale and set by set, pair by pair."""
    data, losses, size = config.sigma_data, [], config.set_size
    for first in range(0, len(x), size):
        members = range(first, first + size)
        s, r, t = (time[first].item() for time in drawn[:3])

        def f(i: int, time: float, label: int, s: float = s) -> torch.Tensor:
            alpha, sigma = 1 - time, time
            z = alpha * x[i] + sigma * data * e[i]
            c_in = 1 / (sqrt(alpha**2 + sigma**2) * data)
            told = (torch.tensor([value], dtype=F64) for value in (s, time))
            return z - (time - s) * data * net((c_in * z)[None], *told, torch.tensor([label]))[0]

        null = net.num_classes
        a = [f(i, t, null if drawn.drop[i] else int(y[i])) for i in members]
        with torch.no_grad():
            b = [f(i, r, int(y[i])) for i in members]

        def mean(xs: list, ys: list, w: float = 1 / ((t - s) * data)) -> torch.Tensor:
            kernels = []
            for p in xs:
                for q in ys:
                    norm = (p - q).norm() if (p - q).norm() > 2e-4 * data else torch.tensor(2e-4 * data, dtype=F64)
                    kernels.append((-w * norm / p.numel()).exp())
            return sum(kernels) / len(kernels)

        ratio = 2 * log((1 - t) / t)
        slope = -2 / t - 2 / (1 - t)
        factor = 0.5 / (1 + exp(ratio - config.weight_b)) * -slope * (1 - t) ** config.weight_a
        losses.append(factor / ((1 - t) ** 2 + t**2) * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("config, embedding", CONFIGS.values(), ids=CONFIGS)
def test_a_step_is_that_of_the_equations(config, embedding):
    net, (x, e, y) = network(time_embedding=embedding, time_scale=1000.0), batch(12)
    x = config.sigma_data * x
    objective = Imm(config, 24, groups=1, micro_batches=2)
    for part in range(2):
        drawn = objective.drawn(3, 4, part)
        terms = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn))
        wanted = plain_loss(config, net, x, e, y, drawn)
        assert_near(terms.loss.detach(), wanted.detach())
        assert_near(gradients(terms.loss, net), gradients(wanted, net))
        assert (terms.raw > 0).all()


def test_the_scale_of_the_data_is_a_unit():
    """Latents and noise of standard deviation 0.5 are latents of 1 and our noise."""
    net, (x, e, y) = network(), batch(8)
    found = []
    for data in (1.0, 0.5):
        objective = Imm(replace(BASE, sigma_data=data), 8)
        drawn = objective.drawn(3, 4, 0)
        found.append(ObjectiveLoss(objective, net)(data * x, e, y, drawn, objective.plan(drawn)))
    one, half = found
    assert_near(half.a, 0.5 * one.a, 1e-13)
    assert_near(half.raw, one.raw, 1e-12)
    assert_near(half.loss.detach(), one.loss.detach(), 1e-12)


# --- data of a normal distribution, whose exact map is known ---


class Exact(nn.Module):
    """The network whose map takes data of N(0, std^2) along their flow: z_t keeps its place among them."""

    num_classes, dtype = 0, F64

    def __init__(self, std: float, data: float):
        super().__init__()
        self.std, self.data = std, data
        self.factor = nn.Parameter(torch.ones((), dtype=F64))

    def spread(self, t):
        return ((1 - t) ** 2 * self.std**2 + (t * self.data) ** 2).sqrt()

    def forward(self, z, s, t, y, dtype=None):
        s, t = (a.reshape(-1, 1, 1, 1) for a in (s, t))
        z = z * self.data * ((1 - t) ** 2 + t**2).sqrt()
        gap = torch.where(t == s, 1, (t - s) * self.data)
        return self.factor * (z - self.spread(s) / self.spread(t) * z) / gap


def test_nothing_is_left_of_the_exact_map():
    """Where f_{s,t}(z_t) = f_{s,r}(z_r), two crowds are one: no value, no gradient."""
    net, (z, _, y) = Exact(0.7, 0.5), batch(12)
    objective = Imm(replace(BASE, label_drop=0.0, gap_power=7), 12)
    drawn = objective.drawn(3, 4, 0)
    r, t = (a.reshape(-1, 1, 1, 1) for a in (drawn.r, drawn.t))
    assert (drawn.s <= drawn.r).all() and (drawn.r < drawn.t).all()
    # data and noise whose z_t and z_r are on one way: (1 - t) x + t n = z_t, (1 - r) x + r n = z_r
    z_t, z_r = z, net.spread(r) / net.spread(t) * z
    x, n = (t * z_r - r * z_t) / (t - r), ((1 - r) * z_t - (1 - t) * z_r) / (t - r)
    passes = objective.passes(())

    def terms():
        return objective.terms(Passes(passes, net), x, n / 0.5, y, drawn, objective.example(()))

    found = terms()
    assert_near(found.a, found.b, 1e-12)
    assert found.raw.abs().max() < 1e-13
    assert torch.autograd.grad(found.loss, [net.factor])[0].abs() < 1e-6 * _gradient_beside(net, terms)
    net.factor.data.fill_(1.01)
    assert terms().raw.min() > 1e-9


def _gradient_beside(net: Exact, terms) -> float:
    net.factor.data.fill_(1.5)
    found = torch.autograd.grad(terms().loss, [net.factor])[0].abs().item()
    net.factor.data.fill_(1.0)
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_samples_of_the_exact_map_are_the_datas(steps):
    """From noise of T they keep their place, in any number of steps."""
    net, noise = Exact(0.7, 0.5), batch(4)[0]
    got = sample(view_of(ImmConfig(omega=1.0), net), noise, torch.zeros(4).long(), even_times(steps))
    begin = net.spread(torch.tensor(0.994, dtype=F64))
    assert_near(got, 0.7 / begin * 0.5 * noise, 1e-12)


@pytest.mark.parametrize("omega", [1.0, 1.5])
def test_samples_are_pushed_from_time_to_time_and_guided_by_two_calls(omega):
    net, (noise, _, y), config = network(), batch(4), ImmConfig(t_min=0.006, omega=omega)
    z, times = 0.5 * noise, [0.994, 0.5, 0.006]
    for t, s in zip(times, times[1:], strict=False):
        one, null = torch.ones(4, dtype=F64), torch.full_like(y, net.num_classes)
        c_in = 1 / (0.5 * sqrt((1 - t) ** 2 + t**2))
        cond, uncond = (net(c_in * z, s * one, t * one, label) for label in (y, null))
        z = z - (t - s) * 0.5 * (uncond + omega * (cond - uncond))
    assert_near(sample(view_of(config, net), noise, y, even_times(2)), z, 1e-12)


# --- draws, weight, cost, options ---


def test_draws():
    objective = Imm(ImmConfig(), 4096, groups=4, micro_batches=4)
    whole, draws = Imm(ImmConfig(), 4096).drawn(5, 50, 0), Draws(5, 50, torch.arange(4096))
    assert torch.equal(whole.drop, draws.uniform(Purpose.LABEL_DROP) < 0.1)
    for part in range(4):
        samples, drawn = objective.split.samples(part), objective.drawn(5, 50, part)
        assert (samples.reshape(-1, 4) == samples[::4, None] + torch.arange(4)).all() and (samples[::4] % 4 == 0).all()
        assert all(torch.equal(a, b[samples]) for a, b in zip(drawn, whole, strict=True))
    s, r, t = (time.reshape(-1, 4) for time in whole[:3])
    assert all((time == time[:, :1]).all() for time in (s, r, t)) and len(t.unique()) > 1000
    assert (s <= r).all() and (r < t).all() and t.max() <= 0.994
    assert t.mean() == pytest.approx(0.497, abs=0.03) and (s / t).mean() == pytest.approx(0.5, abs=0.03)
    eta, apart = [a / (1 - a) for a in (s, r, t)], r > s
    step = 0.994 / 0.006 / 2**12
    torch.testing.assert_close((eta[2] - eta[1])[apart], torch.full((int(apart.sum()),), step, dtype=F64))
    assert ((eta[2] - eta[1])[~apart] <= step * (1 + 1e-9)).all() and 0.05 < (~apart).double().mean() < 0.2
    cifar = Imm(ImmConfig(t_min=0.006, time_law="log_normal"), 8192).drawn(5, 50, 0)
    log_eta = (cifar.t / (1 - cifar.t)).log()
    assert cifar.s.min() >= 0.006 and (cifar.s < cifar.t).all() and log_eta.mean() == pytest.approx(-1.0, abs=0.1)


def test_ends_of_the_laws_are_finite():
    """Uniform numbers at the ends of their range: s < t, and a weight without a pole."""
    last = 1 - 2**-24
    u_t, u_s = torch.tensor([[0.0, 0.0, last, last], [0.0, last, 0.0, last]])
    for config, _ in CONFIGS.values():
        s, r, t = arrange_times(config, u_t, u_s)
        assert (config.t_min <= s).all() and (s < t).all() and (s <= r).all() and (r < t).all()
        assert weight(config, t).isfinite().all() and (t <= config.t_max).all()


def test_what_a_step_costs():
    """Four forward passes of the batch."""
    model = replace(ModelConfig.official("B/4"), depth=4, time_embedding="t,r", time_scale=1000.0)
    objective = Imm(ImmConfig(), 8)
    cost = forwards(objective, model, ())
    assert cost == pytest.approx(4.0, abs=0.07)
    assert counted_forwards(objective, model, ()) == pytest.approx(cost, rel=1e-6)


WRONG = {
    "set_size": 0, "t_min": 1.0, "t_max": 1.0, "gap_power": 41, "weight_a": -1.0, "weight_b": 101.0,
    "sigma_data": 0.0, "p_std": 0.0, "label_drop": 1.5, "omega": -1.0, "p_mean": float("nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(name):
    with pytest.raises(UserError, match=f"^objective.{name}: got ") as error:
        ImmConfig(**{name: WRONG[name]})
    assert "\n" not in str(error.value)


def test_runs_that_cannot_be_are_refused(tmp_path):
    run = runs.tiny("digits-imm")
    with pytest.raises(
        UserError, match=r"model.time_embedding: got 't', wanted one of t,r t,h t,r,h with this objective"
    ):
        replace(run, model=replace(run.model, time_embedding="t"))
    with pytest.raises(UserError, match=r"train.batch: got 12, wanted a multiple of 8 .*4 samples of a set.*take 16"):
        Imm(ImmConfig(), 12, micro_batches=2)
    with pytest.raises(UserError, match=r"train.groups: got 4, wanted a divisor of the batch 8 / 4"):
        Imm(ImmConfig(), 8, groups=4)
    world = SimpleNamespace(connected=True, device=torch.device("cpu"))
    for parallel in ("zero1", "fsdp"):
        sharded = replace(run, train=replace(run.train, parallel=parallel, precision="bf16"))
        with pytest.raises(UserError, match=f"train.parallel: got {parallel}, wanted ddp.* take ddp") as error:
            check(sharded, world, Imm(run.objective, 8))
        assert "\n" not in str(error.value)
        check(replace(sharded, train=replace(sharded.train, precision="fp32")), world, Imm(run.objective, 8))


# --- what the trainer makes of it ---


def test_the_target_is_in_fp32(tmp_path):
    trainer, seen = Trainer(runs.tiny("digits-imm", precision="bf16"), tmp_path), []
    trainer.net.blocks[0].attn.qkv.register_forward_hook(
        lambda _, args, out: seen.append((out[0].primal.dtype, torch.is_grad_enabled()))
    )
    trainer.make_step(*trainer.inputs(0))
    assert seen == [(torch.float32, False), (torch.bfloat16, True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(runs.tiny("digits-imm", groups=2), out) == 0
    return out


def test_a_run_is_logged_and_resumed(whole, tmp_path):
    rows = runs.curve(whole)
    assert all(0 < row["raw"] < 2 and row["weight"] > 0 and row["skipped"] == 0 for row in rows)
    run = runs.tiny("digits-imm", groups=2)
    assert from_dict(to_dict(run)) == run and to_dict(run)["objective"]["kind"] == "imm"
    with pytest.raises(UserError, match="objective: got 'imm', wanted one whose steps lead from z_t to z_r"):
        convert.make_pipeline(convert.load(whole, "run", "ema"))
    Trainer(run, tmp_path).run(stop=iter([False] * 4 + [True]).__next__)
    assert train(run, tmp_path) == 0
    assert runs.final_state(tmp_path) == runs.final_state(whole)
