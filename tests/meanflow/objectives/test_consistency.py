"""Consistency training and sCM: on the real network against their equations, by what they cost, in closed form."""

from dataclasses import replace
from math import log, pi, sqrt, tan

import pytest
import runs
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig
from meanflow.config_json import from_dict, to_dict
from meanflow.errors import UserError
from meanflow.interop.weights import load_ema
from meanflow.method.contract import ObjectiveLoss
from meanflow.method.edm import denoiser, sample_by_renoising
from meanflow.method.passes import Passes, func_jvp
from meanflow.method.sampling import sample
from meanflow.model.build import build_net
from meanflow.objectives.ict import Drawn as Pair
from meanflow.objectives.ict import Ict, IctConfig
from meanflow.objectives.scm import Drawn as Level
from meanflow.objectives.scm import Scm, ScmConfig
from meanflow.training.flops import sample_flops
from meanflow.training.trainer import Trainer, train
from meanflow_kernels.routing import Route, force_route

MODEL = ModelConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=4, in_channels=3, num_classes=5, time_embedding="t"
)
BATCH = 6


def network(**model) -> nn.Module:
    """A DiT in fp64, none of whose weights is zero."""
    net = build_net(replace(MODEL, **model)).double()
    for p in net.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return net


def batch() -> list[torch.Tensor]:
    """x, e and y."""
    generator = torch.Generator().manual_seed(3)
    x, e = torch.randn(2, BATCH, MODEL.in_channels, 4, 4, generator=generator, dtype=torch.float64)
    return [0.5 * x, e, torch.randint(MODEL.num_classes, (BATCH,), generator=generator)]


# --- the equations, a sample at a time ---


def plain_ict(config: IctConfig, net: nn.Module, average: nn.Module, x, e, y, drawn: Pair) -> torch.Tensor:
    losses = []
    for i, (upper, lower) in enumerate(zip(drawn.sigma.tolist(), drawn.lower.tolist(), strict=True)):

        def denoised(net, s, i=i):
            data, low = config.sigma_data, config.sigma_min
            time = torch.tensor([log(s) / 4 * MODEL.time_scale], dtype=torch.float64)
            z = x[i : i + 1] + s * e[i : i + 1]
            out = net(z / sqrt(s**2 + data**2), time, time, y[i : i + 1])
            return data**2 / ((s - low) ** 2 + data**2) * z + data * (s - low) / sqrt(s**2 + data**2) * out

        with torch.no_grad():
            target = denoised(average, lower)
        c = 0.00054 * sqrt(x[0].numel())
        d = ((denoised(net, upper) - target).square().sum() + c**2).sqrt() - c
        losses.append(d / (upper - lower))
    return torch.stack(losses).mean()


def plain_scm(config: ScmConfig, net: nn.Module, _, x, e, y, drawn: Level) -> torch.Tensor:
    losses, data = [], config.sigma_data
    for i, (sigma, rho) in enumerate(zip(drawn.sigma, drawn.rho.tolist(), strict=True)):
        t = torch.atan(sigma / data)[None]
        cos, sin = t.cos(), t.sin()
        x_t, velocity = cos * x[i] + sin * data * e[i], cos * data * e[i] - sin * x[i]

        def prediction(x_t, t, i=i):
            time = t if config.time_input == "angle" else (data * t.tan()).log() / 4
            return -net(x_t[None] / data, time, time, y[i : i + 1])[0]

        _, j = torch.func.jvp(prediction, (x_t, t), (cos * sin * velocity, cos * sin))
        f = prediction(x_t, t)
        g = -(cos**2) * (data * f - velocity) - rho * (cos * sin * x_t + data * j)
        norm = g.norm() if config.norm == "l2" else g.square().mean().sqrt()
        g = (g / (norm + config.norm_c)).detach()
        w = torch.zeros(())
        if config.log_variance:
            time = (data * t.tan()).log() / 4
            w = net(x_t[None] / data, time, time, y[i : i + 1], head="log_variance")[1][0]
        raw = (f - f.detach() - g).square().mean() / (x[i].numel() if config.divide_twice else 1)
        losses.append((1 / sigma if config.prior_weight else 1) * (-w).exp() * raw + w)
    return torch.stack(losses).mean()


CASES = {
    "ict": (Ict, plain_ict, IctConfig(), {}),
    "ict-ema": (Ict, plain_ict, IctConfig(target_weights="ema"), {}),
    "scm": (Scm, plain_scm, ScmConfig(), {"log_variance": True}),
    "scm-paper": (
        Scm,
        plain_scm,
        ScmConfig(time_input="angle", norm="l2", divide_twice=False, prior_weight=False, log_variance=False),
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_that_of_the_equations(name):
    made, plain, config, model = CASES[name]
    net, average, (x, e, y) = network(**model), network(**model), batch()
    for p in average.parameters():
        p.data.mul_(-0.5)
    objective = made(config, BATCH, steps=1000)
    drawn = objective.drawn(7, 700, 0)
    terms = ObjectiveLoss(objective, net, average)(x, e, y, drawn, objective.plan(drawn))
    wanted = plain(config, net, average if name == "ict-ema" else net, x, e, y, drawn)
    assert terms.loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    names = [name for name, _ in net.named_parameters()]
    found = torch.autograd.grad(terms.loss, list(net.parameters()))
    for name, a, b in zip(names, found, torch.autograd.grad(wanted, list(net.parameters())), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm().clamp(min=1e-12), name


@pytest.mark.parametrize("name", ["ict", "scm"])
def test_a_step_costs_four_forward_passes(name):
    made, _, config, model = CASES[name]
    model = replace(ModelConfig.official("B/4"), time_embedding="t", **model)
    objective, cost = made(config, BATCH), sample_flops(model)
    drawn = pytree.tree_map(lambda a: a.to("meta"), objective.drawn(0, 0, 0))
    with torch.device("meta"):
        net, (x, e) = build_net(model), torch.empty(2, BATCH, 4, 32, 32)
        y = torch.empty(BATCH, dtype=torch.long)
    with force_route(Route.TRITON), FlopCounterMode(display=False) as counter:
        ObjectiveLoss(objective, net)(x, e, y, drawn, objective.example(())).loss.backward()
    declared = cost.of_passes(objective.passes(()))
    assert counter.get_total_flops() == pytest.approx(declared, rel=1e-5)
    assert declared == pytest.approx(4.0 * BATCH * cost.forward, rel=0.02)


# --- data of a normal distribution, whose consistency function is known ---


class Exact(nn.Module):
    """The network whose denoiser takes data of N(0, std^2) back along their ODE: x_sigma keeps its place among them."""

    num_classes = 0

    def __init__(self, std: float, sigma_data: float, sigma_min: float):
        super().__init__()
        self.std, self.data, self.low = std, sigma_data, sigma_min
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def shrink(self, sigma):
        """x_sigma at sigma_min over x_sigma."""
        return ((self.std**2 + self.low**2) / (self.std**2 + sigma**2)).sqrt()

    def forward(self, z, r, t, y):
        sigma = (4 * t).exp().reshape(-1, 1, 1, 1)
        root = (sigma**2 + self.data**2).sqrt()
        skip = self.data**2 / ((sigma - self.low) ** 2 + self.data**2)
        return self.factor * (self.shrink(sigma) - skip) * root * z * root / (self.data * (sigma - self.low))


def test_nothing_is_left_of_an_exact_consistency_function():
    net, (x, _, y), (upper, lower) = (
        Exact(0.7, 0.5, 0.002),
        batch(),
        (torch.tensor([3.0, 0.4]), torch.tensor([2.5, 0.1])),
    )
    upper, lower = upper.double().repeat(3), lower.double().repeat(3)
    # data and noise whose x_sigma at both levels are on one way
    x_upper, x_lower = (x / net.shrink(sigma).reshape(-1, 1, 1, 1) for sigma in (upper, lower))
    e = (x_upper - x_lower) / (upper - lower).reshape(-1, 1, 1, 1)
    x = x_upper - upper.reshape(-1, 1, 1, 1) * e
    objective = Ict(IctConfig(huber_c=0.0), BATCH)

    def raw(net):
        return objective.terms(
            Passes(objective.passes(()), net), x, e, y, Pair(upper, lower), objective.example(())
        ).raw

    assert raw(net).max() < 1e-13
    net.factor.data.mul_(1.001)
    assert raw(net).min() > 1e-6


def test_no_tangent_is_left_of_an_exact_consistency_function():
    net, (x_t, _, y), sigma = Exact(0.7, 0.5, 0.0), batch(), torch.tensor([0.01, 0.3, 2.0, 70.0, 0.002, 0.9]).double()
    # the mean of data and noise given x_t, whose velocity is the ODE's
    variance = (0.49 + sigma**2).reshape(-1, 1, 1, 1)
    x_sigma, s = x_t, sigma.reshape(-1, 1, 1, 1)
    x, e = 0.49 / variance * x_sigma, s / variance * x_sigma
    objective = Scm(ScmConfig(log_variance=False), BATCH)

    def tangent(rho):
        passes = Passes(objective.passes(()), net, jvp=func_jvp)
        return objective.terms(
            passes, x, e, y, Level(sigma, torch.full_like(sigma, rho)), objective.example(())
        ).tangent

    assert tangent(1.0).abs().max() < 1e-13
    assert tangent(0.5).abs().amax((1, 2, 3)).min() > 1e-7
    net.factor.data.mul_(1.001)
    assert tangent(1.0).abs().amax((1, 2, 3)).min() > 1e-9


# --- draws and options ---


def test_levels_are_drawn_by_the_step_and_the_shape_stays():
    objective = Ict(IctConfig(), 512, micro_batches=2, steps=8000)
    early, late = (objective.drawn(1, step, 0) for step in (0, 7999))
    gaps = [(drawn.sigma / drawn.lower).log().median() for drawn in (early, late)]
    assert gaps[0] > 50 * gaps[1] and early.sigma.shape == late.sigma.shape == (256,)
    assert objective.declared == ((),) and objective.plan(early) == objective.plan(late, early) == objective.example(())
    again = objective.drawn(1, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(early, again, strict=True))
    assert not torch.equal(early.sigma, objective.drawn(1, 0, 1).sigma)
    ect = Ict(IctConfig(pairs="ect", ect_stage_steps=1000, scalings="plain"), 512, steps=8000)
    ratios = [
        (drawn.lower / drawn.sigma)[drawn.sigma > 5].mean() for drawn in (ect.drawn(1, 0, 0), ect.drawn(1, 4000, 0))
    ]
    assert 0.3 < ratios[0] < 0.5 and 0.9 < ratios[1] < 0.97


def test_scm_draws_a_truncated_log_normal_and_warms_up():
    objective = Scm(ScmConfig(sigma_max=80.0), 4096, steps=1)
    drawn = objective.drawn(1, 2500, 0)
    assert (drawn.rho == 0.25).all() and objective.drawn(1, 20_000, 0).rho.unique() == 1
    assert drawn.sigma.log().mean() == pytest.approx(-1, abs=0.06) and drawn.sigma.log().std() == pytest.approx(
        1.4, abs=0.06
    )
    assert 0.002 <= drawn.sigma.min() and drawn.sigma.max() <= 80
    assert tan(pi / 2 - 1e-4) * 0.5 > 800  # FastGen's clamp of t is above all levels


@pytest.mark.parametrize(
    "make",
    [
        lambda: IctConfig(sigma_min=0.0),
        lambda: IctConfig(sigma_max=0.001),
        lambda: IctConfig(s0=0),
        lambda: IctConfig(s1=5),
        lambda: IctConfig(huber_c=-1.0),
        lambda: IctConfig(ect_q=1.0),
        lambda: IctConfig(ect_stage_steps=0),
        lambda: IctConfig(p_std=0.0),
        lambda: ScmConfig(sigma_min=0.0),
        lambda: ScmConfig(warmup_steps=-1),
        lambda: ScmConfig(norm_c=float("nan")),
        lambda: replace(MODEL, time_scale=0.0),
        lambda: ModelConfig.official("imf-B/2", log_variance=True),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(UserError, match="wanted"):
        make()


def test_what_a_network_embeds():
    x, _, y = batch()
    t = torch.linspace(-1.5, 1, BATCH).double()
    one, scaled = network(), network(time_scale=1000.0)
    assert torch.equal(one(x, 0 * t, t, y), one(x, t, t, y))
    torch.testing.assert_close(scaled(x, 0 * t, t, y), one(x, 0 * t, 1000 * t, y), rtol=0, atol=0)
    with_head = network(log_variance=True)
    u, w, u_dot = with_head(x, 0 * t, t, y, head="log_variance", tangents=(x, None, torch.ones_like(t)))
    assert torch.equal(u, one(x, t, t, y)) and w.shape == t.shape and u_dot.shape == u.shape
    primals, tangents = (x, t), (x, torch.ones_like(t))
    _, wanted = torch.func.jvp(lambda z, t: scaled(z, 0 * t, t, y), primals, tangents)
    _, found = scaled(x, 0 * t, t, y, tangents=(x, None, torch.ones_like(t)))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert build_net(replace(MODEL, log_variance=True)).log_variance.weight.abs().max() == 0


# --- what the trainer makes of them ---

RUNS = {
    "ict": (IctConfig(sigma_data=0.75), {"time_scale": 1000.0}),
    "scm": (ScmConfig(sigma_data=0.75), {"log_variance": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_train_resume_and_sample(name, tmp_path):
    objective, model = RUNS[name]
    run = runs.tiny()
    run = replace(run, objective=objective, model=replace(run.model, time_embedding="t", **model))
    assert from_dict(to_dict(run)) == run
    train(run, tmp_path / "whole")
    Trainer(run, tmp_path / "cut").run(stop=iter([False] * 4 + [True]).__next__)
    train(run, tmp_path / "cut")
    assert runs.final_state(tmp_path / "cut") == runs.final_state(tmp_path / "whole")
    assert all(row["raw"] > 0 for row in runs.curve(tmp_path / "whole"))
    net, config, *_ = load_ema(tmp_path / "whole", torch.device("cpu"))
    noise, y = torch.randn(4, net.in_channels, net.input_size, net.input_size), torch.arange(4)
    f = denoiser(config.objective.denoising, net.net, y)
    wanted = sample_by_renoising(f, noise, [80.0])
    torch.testing.assert_close(sample(net, noise, y), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="log_variance"):
        replace(run, model=replace(run.model, log_variance=not run.model.log_variance))
