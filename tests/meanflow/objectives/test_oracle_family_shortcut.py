"""Shortcut models against the official numbers; the planned step against the equations; a known flow; FLOPs."""

from dataclasses import replace

import oracle_family as oracle
import pytest
import torch
from family_steps import F64, assert_near, batch, counted_forwards, forwards, gradients, in_f64, network

from meanflow.config import ModelConfig, OptimConfig
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method.contract import ObjectiveLoss
from meanflow.method.sampling import even_times, sample
from meanflow.method.views import Guided
from meanflow.objectives.shortcut import Drawn, Shortcut, ShortcutConfig, arrange_times, bootstrap_levels
from meanflow.training.optim import make_optimizer

DATA = oracle.load("shortcut")
CONFIG, CASES = oracle.settings(DATA, "config"), oracle.settings(DATA, "cases")


def options(case: dict) -> ShortcutConfig:
    """The official hyper-parameters of a case in our words."""
    return ShortcutConfig(
        timesteps=case["denoise_timesteps"],
        bootstrap_every=case["bootstrap_every"],
        level_bias=bool(case["bootstrap_dt_bias"]),
        bootstrap_weights="average" if case["bootstrap_ema"] else "online",
        guide=bool(case["bootstrap_cfg"]),
        omega=case["cfg_scale"],
        label_drop=case["class_dropout_prob"],
        clip=CONFIG["clip"],
        path_eps=CONFIG["path_eps"],
    )


class Mirrored(oracle.TinyNet):
    """The official network in our times and signs: t' = 1 - t, level -log2(t - r), v = -v'."""

    def __init__(self, dtype: torch.dtype, weights: str = "params/", out_mul: float = 1.0):
        super().__init__(DATA, dtype, lambda r, t: (1 - t, -torch.log2(t - r)), weights, -out_mul)


def given(prefix: str, case: dict, dtype: torch.dtype) -> tuple:
    """The objective of a case, x, e, y and what is drawn."""
    d, config, size = oracle.group(DATA, prefix), options(case), case["batch_size"]
    objective = Shortcut(config, size)
    count = size // case["bootstrap_every"]
    x, y = (oracle.tensor(d[key][d["perm"]], dtype) for key in ("x", "y"))

    def both(boot, flow):
        return torch.cat([boot, flow[: size - count]])

    e = both(*(oracle.tensor(d[key], dtype) for key in ("e_boot", "e_flow")))
    levels, guided = bootstrap_levels(config, count)
    levels = both(levels, torch.full((size,), config.finest_level))
    index = both(*(oracle.tensor(d[key]) for key in ("t_int_boot", "t_int_flow")))
    row = torch.arange(size)
    drop = both(torch.zeros(count, dtype=torch.bool), oracle.tensor(d["drop_u"]) < config.dropped)
    drop |= config.omega == 0
    drawn = Drawn(*arrange_times(config, levels, index, dtype), row < count, row < guided, drop)
    return objective, x, e, y, drawn


def networks(case: dict, mode: str) -> tuple[Mirrored, Mirrored]:
    """The network and its average."""
    return tuple(Mirrored(oracle.MODES[mode], weights, case["out_mul"]) for weights in ("params/", "ema/"))


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", CASES)
def test_a_step(name, mode):
    case, d = CASES[name], oracle.group(DATA, f"case/{name}/")
    net, average = networks(case, mode)
    objective, x, e, y, drawn = given(f"case/{name}/", case, oracle.MODES[mode])
    plan = objective.plan(drawn)
    terms = ObjectiveLoss(objective, net, average)(x, e, y, drawn, plan)
    terms.loss.backward()

    # exactly: times, levels, labels, and those of the half steps
    level, labels = -torch.log2(drawn.t - drawn.r), torch.where(drawn.drop, net.num_classes, y[plan.image])
    half = torch.cat([plan.half, plan.half[plan.null]])
    labels_half = torch.cat([labels[plan.half], torch.full_like(plan.null, net.num_classes)])
    exact = {"t": 1 - drawn.t, "level": level, "labels": labels}
    exact |= {"level_half": level[half] + 1, "labels_half": labels_half}
    for key, got in exact.items():
        wanted = torch.from_numpy(d[key])
        assert torch.equal(got.to(wanted.dtype), wanted), key

    of_flow, of_boot = terms.raw[~terms.bootstrap].mean(), terms.raw[terms.bootstrap].mean()
    got = {"x_t": terms.z, "v_target": -terms.u_tgt, "v_pred": -terms.u, "x_t2": terms.z_half, "loss": terms.loss}
    got |= {"v_half1_raw": -terms.u_first, "v_half2_raw": -terms.u_second}
    got |= {"loss_flow": of_flow, "loss_bootstrap": of_boot}
    got |= {"grad_norm": torch.stack([p.grad.norm() for p in net.parameters()]).norm()}
    for key, x in got.items():
        if f"{mode}/{key}" in d:
            oracle.assert_close(x, d[f"{mode}/{key}"], mode, key)
    if wanted := oracle.group(d, f"{mode}/grad/"):
        oracle.assert_gradients(net, wanted, mode)
    assert wanted or mode == "f32"


def test_levels():
    for each in oracle.settings(DATA, "levels/cases"):
        config = ShortcutConfig(timesteps=each["denoise_timesteps"], level_bias=bool(each["bootstrap_dt_bias"]))
        levels, guided = bootstrap_levels(config, each["batch_size"] // each["bootstrap_every"])
        assert levels.tolist() == DATA[f"levels/{each['key']}"].tolist() and guided == each["guided_rows"], each["key"]


def test_steps_of_the_optimizer():
    """Two, with the average that makes the next targets."""
    case = CASES["guided"]
    net, average = networks(case, "f64")
    config = OptimConfig(
        lr=case["lr"], beta1=case["beta1"], beta2=case["beta2"], weight_decay=case["weight_decay"],
        ema_decay=case["target_update_rate"], implementation="torch",
    )  # fmt: skip
    optimizer = make_optimizer(config, net, average)
    for step, prefix in enumerate(("case/guided/", "train/2/"), 1):
        objective, x, e, y, drawn = given(prefix, case, F64)
        optimizer.zero_grad()
        terms = ObjectiveLoss(objective, net, average)(x, e, y, drawn, objective.plan(drawn))
        terms.loss.backward()
        oracle.assert_close(terms.loss, DATA[f"{prefix}f64/loss"], "f64", "loss")
        optimizer.step()
        for group, weights in (("params", net), ("ema", average)):
            for name, p in weights.named_parameters():
                oracle.assert_close(p, DATA[f"train/{step}/f64/{group}/{name}"], "f64", f"{step} {group} {name}")


@pytest.mark.parametrize("mode", oracle.MODES)
def test_samples(mode):
    dtype = oracle.MODES[mode]
    noise, labels = oracle.tensor(DATA["sample/noise"], dtype), oracle.tensor(DATA["sample/labels"])
    for name, case in oracle.settings(DATA, "sample/cases").items():
        net = Mirrored(dtype, "ema/" if case["use_ema"] else "params/")
        if case["cfg_scale"] != 1:
            net = Guided(net, case["cfg_scale"])
        got = sample(net, noise, labels, even_times(case["steps"]))
        oracle.assert_close(got, DATA[f"sample/{name}/{mode}/samples"], mode, name)


# --- against the equations ---


def plain_loss(net, average, x, e, y, drawn, config):
    """Shortcut models, sample by sample, from the equations in their own times and signs."""
    total, null = torch.zeros((), dtype=x.dtype), torch.full((1,), net.num_classes)
    teacher = average if config.bootstrap_weights == "average" else net

    def velocity(net, z, tau, d, label):
        return -net(z, 1 - tau - d, 1 - tau, label)

    for i in range(len(x)):
        tau, d = 1 - drawn.t[i : i + 1], (drawn.t - drawn.r)[i : i + 1]
        j = i if drawn.bootstrap[i] or not config.reuse_images else i - int(drawn.bootstrap.sum())
        label = null if drawn.drop[i] else y[j : j + 1]
        z = (1 - (1 - config.path_eps) * tau) * e[i : i + 1] + tau * x[j : j + 1]
        target = x[j : j + 1] - (1 - config.path_eps) * e[i : i + 1]
        if drawn.bootstrap[i]:
            with torch.no_grad():
                vs, z_, tau_ = [], z, tau
                for _ in range(2):
                    v = velocity(teacher, z_, tau_, d / 2, label)
                    if drawn.guided[i]:
                        v_null = velocity(teacher, z_, tau_, d / 2, null)
                        v = v_null + config.omega * (v - v_null)
                    vs.append(v)
                    z_, tau_ = (z_ + v * d / 2).clamp(-config.clip, config.clip), tau_ + d / 2
                target = ((vs[0] + vs[1]) / 2).clamp(-config.clip, config.clip)
        total = total + (velocity(net, z, tau, d, label) - target).square().mean()
    return total / len(x)


BASE = ShortcutConfig(timesteps=8, bootstrap_every=2, label_drop=0.3)
CONFIGS = {
    "official": BASE,
    "online": replace(BASE, bootstrap_weights="online", omega=3.0),
    "unguided": replace(BASE, guide=False),
    "no label": replace(BASE, omega=0.0),
    "biased": replace(BASE, level_bias=True),
    "clipped": replace(BASE, clip=0.5, path_eps=0.1),
    "images behind": replace(BASE, reuse_images=False),
    "few rows": replace(BASE, bootstrap_every=6),
    "no rows": replace(BASE, bootstrap_every=13),
}


WAYS = {name: (config, ("t", "h")) for name, config in CONFIGS.items()} | {"told as there": (BASE, ("tau", "level"))}


@pytest.mark.parametrize("config, embedding", WAYS.values(), ids=WAYS)
def test_planned_step_is_the_plain_one(config, embedding):
    net, average, (x, e, y) = network(0, time_embedding=embedding), network(1, time_embedding=embedding), batch(12)
    objective = Shortcut(config, 12)
    drawn = in_f64(objective.drawn(seed=3, step=4, micro_batch=0))
    got = ObjectiveLoss(objective, net, average)(x, e, y, drawn, objective.plan(drawn)).loss
    wanted = plain_loss(net, average, x, e, y, drawn, config)
    assert_near(got.detach(), wanted.detach())
    assert_near(gradients(got, net), gradients(wanted, net))


def test_micro_batches_of_uneven_groups():
    """Half steps are padded to one size."""
    config, net, average, (x, e, y) = BASE, network(0), network(1), batch(10)
    objective = Shortcut(replace(config, bootstrap_every=3), 20, micro_batches=2, groups=1)
    objective_of_one = Shortcut(replace(config, bootstrap_every=2), 30, groups=1, micro_batches=3)
    for made in (objective, objective_of_one):
        parts = [in_f64(made.drawn(3, 4, each)) for each in range(made.split.micro_batches)]
        assert len({made.plan(drawn).sizes for drawn in parts}) == 1
        for drawn in parts:
            got = ObjectiveLoss(made, net, average)(x, e, y, drawn, made.plan(drawn, *parts)).loss
            wanted = plain_loss(net, average, x, e, y, drawn, made.config)
            assert_near(got.detach(), wanted.detach())
    assert len({int(drawn.guided.sum()) for drawn in parts}) == 2


def test_a_known_flow_has_no_residual():
    """Of a Gaussian's exact flow, two half steps are one whole step."""
    mean, std = 0.7, 0.4

    class Known(torch.nn.Module):
        num_classes = 1

        def forward(self, z, r, t, y):
            r, t = (a[:, None, None, None] for a in (r, t))
            sigma = [((1 - s) ** 2 * std**2 + s**2).sqrt() for s in (r, t)]
            there = (1 - r) * mean + sigma[0] / sigma[1] * (z - (1 - t) * mean)
            return (z - there) / (t - r)

    objective = Shortcut(replace(BASE, guide=False, clip=100.0), 12)
    drawn = in_f64(objective.drawn(seed=1, step=0, micro_batch=0))
    x, e, y = batch(12)
    terms = ObjectiveLoss(objective, Known(), Known())(x, e, y, drawn, objective.plan(drawn))
    assert terms.bootstrap.sum() == 6 and terms.raw[terms.bootstrap].max() < 1e-25
    assert terms.raw[~terms.bootstrap].min() > 1e-3


# --- draws, cost, options, the network's inputs ---


def test_draws():
    objective = Shortcut(ShortcutConfig(), 4096)
    drawn, draws = objective.drawn(5, 50, 0), Draws(5, 50, torch.arange(4096))
    levels = torch.cat([bootstrap_levels(objective.config, 512)[0], torch.full((3584,), 7)])
    drop = (draws.uniform(Purpose.LABEL_DROP) < 0.1) & (torch.arange(4096) >= 512)
    assert torch.equal(drawn.drop, drop) and drawn.bootstrap.sum() == 512 and drawn.guided.sum() == 73
    h, tau = drawn.t - drawn.r, 1 - drawn.t
    assert torch.equal(h, torch.exp2(-levels.float())) and torch.equal(tau / h, (tau / h).round())
    assert drawn.r.min() == 0 and drawn.t.max() == 1
    assert torch.bincount((tau / h)[512:].long(), minlength=128).min() > 5


def test_what_a_step_costs():
    """3.28 forward passes of the batch, and nothing is padded."""
    model, objective = replace(ModelConfig.official("B/4"), depth=4), Shortcut(ShortcutConfig(), 256)
    (sizes,) = objective.declared
    assert sizes == (32, 4) and forwards(objective, model, sizes) == pytest.approx(3 + 72 / 256, abs=0.02)
    shared = Shortcut(ShortcutConfig(), 256, micro_batches=8)
    (sizes,) = shared.declared
    assert sizes == (4, 1) and forwards(shared, model, sizes) <= 3.28 + 0.07
    assert counted_forwards(shared, model, sizes) == pytest.approx(forwards(shared, model, sizes), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_network_is_told_data_time_and_level(scale):
    """The embedders of tau and level get 1 - t and -log2(t - r); a derivative goes through both."""
    net, (x, _, y) = network(time_embedding=("tau", "level"), time_scale=scale), batch(4)
    told = {}
    for name in ("tau", "level"):
        embedder = net.get_submodule(f"{name}_embedder")
        embedder.register_forward_pre_hook(lambda _, args, name=name: told.update({name: args[0].primal}))
    t, level = torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=F64), torch.tensor([0.0, 1.0, 7.0, 3.0], dtype=F64)
    r = t - torch.exp2(-level)
    net(x, r, t, y)
    assert torch.equal(told["tau"], scale * (1 - t)) and torch.equal(told["level"], scale * level)
    # the kernels' derivative against a difference quotient
    t, r, v = t - 0.1, r - 0.2, torch.ones_like(x)
    _, du = net(x, r, t, y, tangents=(v, torch.full_like(r, 0.5), torch.ones_like(t)))
    eps = 1e-6
    ahead, behind = (net(x + s * v, r + s * 0.5, t + s, y) for s in (eps, -eps))
    torch.testing.assert_close(du, (ahead - behind) / (2 * eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [dict(timesteps=100), dict(bootstrap_every=1), dict(omega=-1.0), dict(clip=0.0), dict(path_eps=1.0)]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError, match=f"objective.{next(iter(wrong))}"):
        ShortcutConfig(**wrong)
