"""SoFlow against the official numbers; the planned step against the equations; a flow known in closed form; FLOPs."""

from dataclasses import replace

import numpy as np
import oracle_family as oracle
import pytest
import torch
from family_steps import F64, assert_near, batch, counted_forwards, forwards, gradients, in_f64, network

from meanflow.config import ModelConfig
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method.contract import ObjectiveLoss
from meanflow.method.sampling import Sampler, even_times, sample_anew
from meanflow.objectives.soflow import Drawn, SoFlow, SoFlowConfig, arrange_times, kappa, ratio

DATA = oracle.load("soflow")
CASES = oracle.settings(DATA, "cases")


def options(case: dict) -> SoFlowConfig:
    """The official hyper-parameters of a case in our words."""
    laws = list(zip(case["time_mean"], case["time_std"], strict=True))
    return SoFlowConfig(
        velocity_share=case["velocity_loss_ratio"],
        velocity_time=laws[0],
        end_time=laws[1],
        start_time=laws[2],
        ratio_schedule=case["l_schedule"].lower(),
        ratio_first=case["l_init_ratio"],
        ratio_last=case["l_end_ratio"],
        norm_p=case["p"],
        norm_c=case["eps"],
        omega=case["cfg_scale"],
        guidance_end=case["cfg_decay_time"],
        mix=case["mix_ratio"],
        label_drop=case["cfg_drop_rate"],
    )


def tiny(dtype: torch.dtype) -> oracle.TinyNet:
    return oracle.TinyNet(DATA, dtype, lambda r, t: (t, t - r))


def given(name: str, dtype: torch.dtype) -> tuple:
    """The objective of a case, x, e, y and what is drawn."""
    case, d = CASES[name], oracle.group(DATA, f"case/{name}/")
    config = options(case)
    objective = SoFlow(config, case["batch_size"], steps=case["total_steps"])
    x, e, n_t_fm, n_s, n_t, u = (oracle.tensor(d[key], dtype) for key in ("x", "e", "n_t_fm", "n_s", "n_t", "drop_u"))
    velocity = torch.arange(len(x)) < len(n_t_fm)
    a, b = torch.cat([n_t_fm, n_t]), torch.cat([torch.zeros_like(n_t_fm), n_s])
    times = arrange_times(config, a, b, velocity, case["step"] / case["total_steps"])
    y = oracle.tensor(d["y"])
    if case["dataset_type"] == "CIFAR10":  # trains without labels
        y = torch.full_like(y, case["num_classes"])
    return objective, x, e, y, Drawn(*times, velocity, u < config.dropped)


def step(name: str, mode: str) -> tuple:
    """The network with its gradient, what it was given, and the terms."""
    objective, *inputs, drawn = given(name, oracle.MODES[mode])
    net = tiny(oracle.MODES[mode])
    terms = ObjectiveLoss(objective, net)(*inputs, drawn, objective.plan(drawn))
    terms.loss.backward()
    return net, inputs, drawn, terms


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, mode):
    net, (x, e, y), drawn, terms = step(name, mode)
    d, count = oracle.group(DATA, f"case/{name}/"), CASES[name]["n_fm"]
    labels = torch.where(drawn.drop, net.num_classes, y)
    z = (1 - drawn.t[:, None, None, None]) * x + drawn.t[:, None, None, None] * e
    fm, cons, guided = slice(count), slice(count, None), CASES[name]["cfg_scale"] > 1
    got = {"fm/t": drawn.t[fm], "fm/z_t": z[fm], "fm/v_pred": terms.u[fm], "fm/mse": terms.raw[fm].mean()}
    got |= {"fm/weight_mean": terms.weight[fm].mean(), "fm/mse_per_sample": terms.raw[fm]}
    got |= {"fm/weight_per_sample": terms.weight[fm], "fm/loss_per_sample": (terms.weight * terms.raw)[fm]}
    got |= {"cons/t": drawn.t[cons], "cons/s": drawn.s[cons], "cons/l": drawn.l[cons], "cons/z_t": z[cons]}
    got |= {"cons/z_l": terms.z_l, "cons/N_t": terms.u[cons], "cons/N_l": terms.u_l, "cons/mse": terms.raw[cons].mean()}
    got |= {"cons/weight_mean": terms.weight[cons].mean(), "cons/mse_per_sample": terms.raw[cons]}
    got |= {"cons/weight_per_sample": terms.weight[cons], "loss": terms.loss}
    got |= {"fm/target": terms.v_m[fm], "cons/v_masked": terms.v_m[cons]} if guided else {}
    checked = {key for key in got if f"{mode}/{key}" in d}
    assert {"loss"} <= checked
    for key in checked:
        oracle.assert_close(got[key], d[f"{mode}/{key}"], mode, key)
    for part, samples in (("fm", fm), ("cons", cons)):
        if f"{part}/labels" in d:
            assert torch.equal(labels[samples], oracle.tensor(d[f"{part}/labels"]))
            assert np.array_equal(drawn.drop[samples].numpy(), d[f"{part}/drop_mask"])
    wanted = oracle.group(d, f"{mode}/grad/")
    if wanted:
        oracle.assert_gradients(net, wanted, mode)
    norm = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
    oracle.assert_close(norm, d[f"{mode}/grad_norm"], mode, "norm of the gradient")


def test_gradients_are_there_to_compare():
    assert all(oracle.group(DATA, f"case/{name}/f64/grad/") for name in CASES)


def test_tables():
    for method, wanted in oracle.group(DATA, "schedule/f64/").items():
        config = SoFlowConfig(ratio_schedule=method.lower())
        got = [ratio(config, step / int(DATA["schedule/total"])) for step in DATA["schedule/steps"].tolist()]
        oracle.assert_close(torch.tensor(got, dtype=F64), wanted, "f64", method)
    for name, wanted in oracle.group(DATA, "kappa/f64/decay").items():
        config = SoFlowConfig(guidance_end=float(name))
        oracle.assert_close(kappa(config, torch.from_numpy(DATA["kappa/t"])), wanted, "f64", name)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_samples(mode):
    dtype = oracle.MODES[mode]
    noise, labels, renoise = (oracle.tensor(DATA[f"sample/{key}"], None) for key in ("noise", "labels", "renoise"))
    renoise = renoise.permute(0, 1, 4, 2, 3).to(dtype)
    for key in [key for key in DATA if key.endswith(f"/{mode}/samples")]:
        times = even_times(int(key.split("/")[1].removeprefix("N")))
        assert np.array_equal(times[:-1], DATA[key.replace(f"{mode}/samples", "t")])
        got = sample_anew(Sampler(tiny(dtype)), noise.to(dtype), labels, times, renoise[: len(times) - 2])
        oracle.assert_close(got, DATA[key], mode, key)
    with pytest.raises(UserError, match="renoise"):
        sample_anew(Sampler(tiny(dtype)), noise.to(dtype), labels, (1.0, 0.5, 0.0))


# --- against the equations ---


def plain_loss(net, x, e, y, drawn, config):
    """SoFlow, sample by sample, from the equations: every pass for every sample."""
    total = torch.zeros((), dtype=x.dtype)
    null = torch.full((1,), net.num_classes)
    for i in range(len(x)):
        s, l, t = (a[i : i + 1] for a in (drawn.s, drawn.l, drawn.t))
        dropped = bool(drawn.drop[i])
        label = null if dropped else y[i : i + 1]
        z = (1 - t) * x[i : i + 1] + t * e[i : i + 1]
        velocity = e[i : i + 1] - x[i : i + 1]
        with torch.no_grad():
            target = velocity
            if config.omega > 1 and not dropped:
                strength = (config.omega - 1) * kappa(config, t)
                target = velocity + strength * (velocity - net(z, t, t, null))
                target = config.mix * target + (1 - config.mix) * net(z, t, t, label)
        if drawn.velocity[i]:
            square = (net(z, t, t, label) - target).square().mean()
            total = total + square / (square.detach() + config.norm_c) ** config.norm_p
            continue
        with torch.no_grad():
            z_l = z + target * (l - t)
            delta = (z + (s - t) * net(z, s, t, label) - z_l - (s - l) * net(z_l, s, l, label)) / (t - l)
            weight = 1 / (delta.square().mean() + config.norm_c) ** config.norm_p
        total = total - weight * (net(z, s, t, label) * delta).mean()
    return total / len(x)


BASE = SoFlowConfig(velocity_share=0.5, label_drop=0.3)
CONFIGS = {
    "official": BASE,
    "no guidance": replace(BASE, omega=1.0),
    "dropped without guidance": replace(BASE, omega=1.0, drop_unguided=True),
    "not mixed": replace(BASE, mix=1.0, guidance_end=1.0),
    "another weight": replace(BASE, norm_p=0.5, norm_c=0.1),
    "all labels": replace(BASE, label_drop=0.0),
    "velocity alone": replace(BASE, velocity_share=1.0),
    "consistency alone": replace(BASE, velocity_share=0.0, label_drop=1.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_planned_step_is_the_plain_one(config):
    net, (x, e, y) = network(), batch(12)
    objective = SoFlow(config, 12, steps=10)
    drawn = in_f64(objective.drawn(seed=3, step=4, micro_batch=0))
    wanted = plain_loss(net, x, e, y, drawn, config)
    gradient = gradients(wanted, net)
    for exact in (False, True):
        got = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn, exact=exact)).loss
        assert_near(got.detach(), wanted.detach())
        assert_near(gradients(got, net), gradient)


def test_micro_batches_of_uneven_groups():
    """A velocity sample among those that may be consistency's."""
    config, net, (x, e, y) = replace(BASE, velocity_share=0.4), network(), batch(12)
    objective = SoFlow(config, 24, groups=3, micro_batches=2, steps=10)
    parts = [in_f64(objective.drawn(3, 4, each)) for each in range(2)]
    counts = {int(drawn.velocity.sum()) for drawn in parts}
    assert len(counts) == 2 and objective.batch - min(counts) == objective.passes((2,))["between"].rows
    for drawn in parts:
        got = ObjectiveLoss(objective, net)(x, e, y, drawn, objective.plan(drawn, *parts)).loss
        wanted = plain_loss(net, x, e, y, drawn, config)
        assert_near(got.detach(), wanted.detach())
        assert_near(gradients(got, net), gradients(wanted, net))


def test_a_known_flow_has_no_residual():
    """A Gaussian's flow is its own solution, along the marginal velocity, up to second order in t - l."""
    mean, std = 0.7, 0.4

    def sigma(t):
        return ((1 - t) ** 2 * std**2 + t**2).sqrt()

    def field(z, s, t):
        s, t = (a[:, None, None, None] for a in (s, t))
        velocity = -mean + (t - (1 - t) * std**2) / sigma(t) ** 2 * (z - (1 - t) * mean)
        there = (1 - s) * mean + sigma(s) / sigma(t) * (z - (1 - t) * mean)
        return torch.where(s == t, velocity, (z - there) / torch.where(s == t, 1, t - s))

    class Known(torch.nn.Module):
        num_classes = 1

        def forward(self, z, r, t, y):
            return field(z, r, t)

    # the data are the one point on the flow through z whose velocity is the marginal one: e - x = v, z given
    objective = SoFlow(replace(BASE, velocity_share=0.0, omega=1.0), 8, steps=1)
    drawn, t = in_f64(objective.drawn(seed=1, step=0, micro_batch=0)), torch.linspace(0.3, 0.95, 8, dtype=F64)
    drawn = drawn._replace(t=t, s=0.3 * t)
    g, residuals = torch.Generator().manual_seed(0), []
    z = torch.randn(8, 1, 2, 2, generator=g, dtype=F64)
    v = field(z, drawn.t, drawn.t)
    x, e = z - drawn.t[:, None, None, None] * v, z + (1 - drawn.t[:, None, None, None]) * v
    for share in (1e-3, 1e-4):
        l = drawn.t + share * (drawn.s - drawn.t)
        near = drawn._replace(l=l)
        terms = ObjectiveLoss(objective, Known())(x, e, torch.zeros(8).long(), near, objective.plan(near))
        residuals.append(terms.raw.sqrt())
    assert (residuals[0] < 5e-2).all()
    torch.testing.assert_close(residuals[0] / residuals[1], torch.full((8,), 10.0, dtype=F64), rtol=0.05, atol=0)


# --- draws, cost, options ---


def test_draws():
    config = SoFlowConfig()
    objective = SoFlow(config, 4096, steps=100)
    drawn, draws = objective.drawn(5, 50, 0), Draws(5, 50, torch.arange(4096))
    velocity, drop = torch.arange(4096) < 3072, draws.uniform(Purpose.LABEL_DROP) < 0.1
    assert torch.equal(drawn.velocity, velocity) and torch.equal(drawn.drop, drop)
    s, l, t = (a[3072:] for a in drawn[:3])
    assert (drawn.s == drawn.t)[:3072].all() and (s < l).sum() > 500 and (l < t).all() and s.min() >= 0
    middle = (0.1 * 0.002) ** 0.5
    wide = t - s > 0.1
    torch.testing.assert_close(((t - l) / (t - s))[wide], torch.full((int(wide.sum()),), middle), rtol=1e-3, atol=0)
    assert drawn.t[:3072].logit().mean() == pytest.approx(-0.2, abs=0.05)
    assert t.logit().mean() == pytest.approx(0.2, abs=0.08) and t.logit().std() == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("size", [32, 256])
def test_what_a_step_costs(size):
    """4.375 forward passes of the batch, and at most .07 for padding."""
    model, objective = replace(ModelConfig.official("B/4"), depth=4), SoFlow(SoFlowConfig(), size, steps=100)
    assert len(objective.declared) < 8
    drawn = [objective.drawn(0, step, 0) for step in range(200)]
    planned = [objective.sizes(each) for each in drawn]
    assert set(planned) <= set(objective.declared)
    padded = np.mean([forwards(objective, model, sizes) for sizes in planned])
    exact = np.mean([forwards(objective, model, objective.sizes(each, exact=True)) for each in drawn])
    assert exact == pytest.approx(3 + 0.9 * 1.25 + 0.25, abs=0.06) and padded <= exact + 0.07 and padded <= 4.47
    if size == 32:
        sizes = objective.declared[1]
        counted = counted_forwards(objective, model, sizes)
        assert counted == pytest.approx(forwards(objective, model, sizes), rel=1e-9)


@pytest.mark.parametrize(
    "wrong", [dict(mix=1.5), dict(norm_c=0.0), dict(start_time=(0.0, -1.0)), dict(least_gap=0.0), dict(ratio_last=0.0)]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}"):
        SoFlowConfig(**wrong)
