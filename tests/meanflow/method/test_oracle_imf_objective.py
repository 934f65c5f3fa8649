"""The objective of improved MeanFlow against the official one: predictions, targets, losses, gradients; whole steps."""

from dataclasses import replace

import numpy as np
import oracle_imf as oracle
import pytest
import torch

from meanflow.config import ObjectiveConfig, OptimConfig
from meanflow.interop.imf_weights import from_official, to_official
from meanflow.method.guidance import arrange_guidance
from meanflow.method.passes import func_jvp, pair_jvp
from meanflow.method.times import drop_mask, equal_prefix
from meanflow.objectives.meanflow import MeanFlow, meanflow_terms
from meanflow.objectives.meanflow_plan import Drawn, guided_scale
from meanflow.training.optim import learning_rate, make_optimizer, set_learning_rate, update_ema

JVPS = {"pairs": pair_jvp, "torch.func": func_jvp}
CASES = oracle.settings(oracle.load("imf_loss_cases"), "cases")
# official name: bar; the weights (S + c)^p are adp
KINDS = {"v_c": "u", "v_u": "u", "v_c_w": "u", "u": "u", "v": "u", "v_g": "derived", "v_g_pre": "derived"}
KINDS |= dict.fromkeys(("du_dt", "V", "S_u", "S_v", "adp_u", "adp_v", "loss", "loss_u", "loss_v"), "derived")


def objective(case: dict, **options) -> ObjectiveConfig:
    """The official hyper-parameters of a case in our words."""
    return ObjectiveConfig(
        guidance_input="interval",
        direction="v_head",
        share_equal=case["data_proportion"],
        label_drop=case["class_dropout_prob"],
        norm_p=case["norm_p"],
        norm_c=case["norm_eps"],
        **options,
    )


def batch(data: dict, prefix: str, config: ObjectiveConfig, dtype: torch.dtype) -> tuple:
    """x, e, r, t, y, drop and the guidance, from the draws."""
    d = oracle.group(data, prefix)
    x, e, t1, t2, ua, ub, omega = (oracle.tensor(d[key], dtype) for key in ("x", "e", "t1", "t2", "ua", "ub", "w"))
    equal = torch.arange(len(x)) < equal_prefix(config, len(x))
    t, r = torch.maximum(t1, t2), torch.minimum(t1, t2)
    inputs = arrange_guidance(config, torch.zeros_like(t), ua, ub, equal)._replace(omega=omega)
    drop = drop_mask(config, oracle.tensor(d["drop_u"]))
    return x, e, torch.where(equal, t, r), t, oracle.tensor(d["y"]), drop, inputs


def test_what_a_step_is_given():
    """Times, intervals, scales and labels, exactly."""
    data = oracle.load("imf_loss_cases")
    for name, case in CASES.items():
        config, wanted = objective(case), oracle.group(data, f"case/{name}/")
        _, _, r, t, y, drop, inputs = batch(data, f"case/{name}/", config, torch.float64)
        got = {"t": t, "r": r, "a": inputs.start, "b": inputs.end, "w_eff": guided_scale(config, t, inputs)}
        got |= {"fm_mask": r == t, "drop_mask": drop}
        for key, x in got.items():
            assert torch.equal(x, torch.from_numpy(wanted[key]).to(x.dtype)), (name, key)
        null = oracle.settings(data, "config")["num_classes"]
        assert torch.equal(torch.where(drop, null, y), oracle.tensor(wanted["y_inp"])), name


def run(name: str, mode: str, jvp, planned: bool):
    """The network, the terms in the batch's order, and the samples that have a derivative."""
    data, dtype = oracle.load("imf_loss_cases"), oracle.MODES[mode]
    config, net = objective(CASES[name]), oracle.network("imf_loss_cases", dtype)
    *inputs, guidance = batch(data, f"case/{name}/", config, dtype)
    if not planned:
        return net, meanflow_terms(config, net, *inputs, inputs=guidance, jvp=jvp), slice(None)
    plan = MeanFlow(config, len(inputs[0])).plan(Drawn(*inputs[2:4], inputs[-1], guidance))
    terms = meanflow_terms(config, net, *inputs, plan, guidance, jvp=jvp)
    assert plan.order is None
    return net, terms, slice(plan.tangent_start, None)


@pytest.mark.parametrize("planned", [False, True], ids=["whole", "planned"])
@pytest.mark.parametrize("jvp", JVPS.values(), ids=JVPS)
@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", CASES)
def test_loss_case(name, mode, jvp, planned):
    data = oracle.load("imf_loss_cases")
    net, terms, derived = run(name, mode, jvp, planned)
    official = oracle.group(data, f"case/{name}/{mode}/")
    numel = terms.u[0].numel()
    got = {"u": terms.u, "v": terms.v, "v_g": terms.v_g, "du_dt": terms.du_dt, "v_c": terms.direction}
    got |= {"S_u": terms.raw, "S_v": terms.raw_v, "adp_u": terms.weight, "adp_v": terms.weight_v, "loss": terms.loss}
    got |= {"loss_u": terms.raw.mean() / numel, "loss_v": terms.raw_v.mean() / numel}
    assert {"S_u", "S_v", "adp_u", "adp_v", "loss", "loss_u", "loss_v"} <= official.keys()
    for key, x in got.items():
        if key not in official:
            continue
        wanted = torch.from_numpy(np.array(official[key]))
        wanted = oracle.tensor(official[key])[derived] if key in ("du_dt", "v_c") else oracle.tensor(official[key])
        if len(wanted.shape) == 0 or len(wanted):
            oracle.assert_close(x, wanted, mode, KINDS[key], key)
    check_gradients(net, terms, data, official, mode)


def check_gradients(net, terms, data, official, mode):
    """Every full array that the set has, and the norm of every leaf and its product with the parameter."""
    terms.loss.backward()
    mlp_hidden = oracle.options(oracle.settings(data, "config"))["mlp_hidden"]
    grads = to_official({name: p.grad for name, p in net.named_parameters()}, mlp_hidden)
    for path, wanted in oracle.group(official, "grad/").items():
        wanted = torch.from_numpy(wanted)
        oracle.assert_close(torch.from_numpy(grads[path]), wanted, mode, "grad", path)
    if "grad_norm" not in official:
        return
    names = [str(name) for name in data["grad_names"]]
    assert sorted(names) == sorted(grads)
    bar = 2e-4 if mode == "f32" else 1e-10
    for i, path in enumerate(names):
        grad, param = grads[path].astype(np.float64), data[f"params/{path}"].astype(np.float64)
        norm, size = official["grad_norm"][i], np.linalg.norm(param)
        assert norm > 0 and abs(np.linalg.norm(grad) - norm) <= bar * norm, path
        if "grad_dot_param" in official:
            assert abs((grad * param).sum() - official["grad_dot_param"][i]) <= bar * norm * size, path


@pytest.mark.parametrize("name", CASES)
def test_guidance_passes(name):
    """Each pass of the official step by itself: v_c with omega and with omega', v_u; and V."""
    data = oracle.load("imf_loss_cases")
    config, net = objective(CASES[name]), oracle.network("imf_loss_cases", torch.float64)
    x, e, r, t, y, _, inputs = batch(data, f"case/{name}/", config, torch.float64)
    z = e * t[:, None, None, None] + x * (1 - t[:, None, None, None])
    scales = {"v_c_w": inputs.omega, "v_c": guided_scale(config, t, inputs), "v_u": torch.ones_like(t)}
    official = oracle.group(data, f"case/{name}/f64/")
    assert {"v_c", "v_u"} <= official.keys()
    for key, omega in scales.items():
        if key in official:
            labels = torch.full_like(y, net.num_classes) if key == "v_u" else y
            oracle.assert_close(net(z, t, t, labels, omega, head="v"), official[key], "f64", "u", key)
    if "V" in official:
        u, du_dt, gap = (torch.from_numpy(a) for a in (official["u"], official["du_dt"], (t - r).numpy()))
        oracle.assert_close(u + gap[:, None, None, None] * du_dt, torch.from_numpy(official["V"]), "f64", "u")


@pytest.mark.parametrize("planned", [False, True], ids=["whole", "planned"])
@pytest.mark.parametrize("mode", oracle.MODES)
def test_training_steps(mode, planned):
    data = oracle.load("imf_train_steps")
    cfg, name = oracle.settings(data, "cfg"), str(data["params_from"]).removesuffix(".npz")
    config, dtype = objective(cfg), oracle.MODES[mode]
    optim = OptimConfig(
        lr=cfg["learning_rate"], warmup_steps=int(cfg["warmup_epochs"] * cfg["steps_per_epoch"]), warmup_from_zero=True,
        beta1=cfg["adam_b1"], beta2=cfg["adam_b2"], eps=cfg["adam_eps"], weight_decay=cfg["weight_decay"],
        ema_decay=cfg["ema_val"],
    )  # fmt: skip
    net, ema = (oracle.network(name, dtype) for _ in range(2))
    optimizer = make_optimizer(optim, net)
    mlp_hidden = oracle.options(oracle.settings(oracle.load(name), "config"))["mlp_hidden"]
    start = {key: x.astype(np.float64) for key, x in oracle.group(oracle.load(name), "params/").items()}
    losses, norms = [], []
    for step in range(cfg["n_steps"]):
        *inputs, guidance = batch(data, f"step{step}/", config, dtype)
        plan = MeanFlow(config, len(inputs[0])).plan(Drawn(*inputs[2:4], inputs[-1], guidance)) if planned else None
        terms = meanflow_terms(config, net, *inputs, plan, guidance)
        optimizer.zero_grad()
        terms.loss.backward()
        losses.append(
            (terms.loss.detach(), terms.raw.mean() / terms.u[0].numel(), terms.raw_v.mean() / terms.u[0].numel())
        )
        norms.append(torch.stack([p.grad.norm() for p in net.parameters()]).norm())
        rate = learning_rate(optim, step)
        assert rate == data["lr"][step]
        set_learning_rate(optimizer, rate)
        optimizer.step()
        update_ema(list(ema.parameters()), list(net.parameters()), optim.ema_decay)
        for key, model in (("params", net), ("ema", ema)):
            check_weights(data, f"step{step}/f64/{key}", to_official(model.state_dict(), mlp_hidden), start, mode)
    for i, key in enumerate(("losses", "loss_u", "loss_v")):
        wanted = torch.from_numpy(data[f"{mode}/{key}"])
        oracle.assert_close(torch.stack([loss[i] for loss in losses]), wanted, mode, "derived", key)
    oracle.assert_close(torch.stack(norms), torch.from_numpy(data[f"{mode}/grad_norms"]), mode, "grad")


def check_weights(data, prefix, got, start, mode):
    """In full where the set has them, and the size of every leaf's change and its product with the start."""
    if mode == "f32":
        return  # Adam blows up what fp32 rounding leaves of gradients near zero, officially too
    for path, wanted in oracle.group(data, f"{prefix}/").items():
        oracle.assert_close(torch.from_numpy(got[path]), torch.from_numpy(wanted), mode, "grad", path)
    for i, path in enumerate(map(str, data["param_names"])):
        change, before = got[path] - start[path], start[path]
        norm, dot = data[f"{prefix}_change_norm"][i], data[f"{prefix}_change_dot_start"][i]
        if norm == 0:
            assert (change == 0).all(), path
            continue
        assert abs(np.linalg.norm(change) - norm) <= 1e-10 * norm, path
        assert abs((change * before).sum() - dot) <= 1e-10 * norm * np.linalg.norm(before), path


def test_learning_rate_of_the_recipe():
    data, optim = oracle.load("imf_train_steps"), OptimConfig(warmup_steps=12_510, warmup_from_zero=True)
    for step, wanted in zip(data["lr_table/steps"], data["lr_table/values"], strict=True):
        # the official schedule rounds 1 - step / n to fp32
        assert abs(learning_rate(optim, int(step)) - float(wanted)) <= 2**-24 * optim.lr
    assert learning_rate(optim, 0) == 0 and learning_rate(replace(optim, warmup_from_zero=False), 0) > 0


def test_which_weights_get_a_gradient_after_so_many_updates():
    data = oracle.load("imf_init_stats")
    options = oracle.options(oracle.settings(data, "config"))
    net, config = oracle.ImfDiT(**options), objective(next(iter(CASES.values())))
    net.init_weights(torch.Generator().manual_seed(0))
    optimizer, g = make_optimizer(OptimConfig(lr=1e-3), net), torch.Generator().manual_seed(1)
    for wanted in data["grad_nonzero"]:
        x, e = torch.randn(2, 4, options["in_channels"], *[options["input_size"]] * 2, generator=g)
        r, t = torch.rand(2, 4, generator=g).sort(0).values
        equal, y = torch.tensor([True, False, False, False]), torch.arange(4)
        guidance = arrange_guidance(config, *torch.rand(3, 4, generator=g), equal)
        optimizer.zero_grad()
        terms = meanflow_terms(config, net, x, e, torch.where(equal, t, r), t, y, equal, inputs=guidance)
        terms.loss.backward()
        grads = to_official({name: p.grad for name, p in net.named_parameters()}, options["mlp_hidden"])
        assert [bool((grads[str(path)] != 0).any()) for path in data["names"]] == wanted.tolist()
        optimizer.step()


def test_official_names_of_gradients_are_all_ours():
    data = oracle.load("imf_loss_cases")
    blank = {str(path): data[f"params/{path}"] for path in data["grad_names"]}
    assert (
        from_official(blank).keys() == dict(oracle.network("imf_loss_cases", torch.float32).named_parameters()).keys()
    )
