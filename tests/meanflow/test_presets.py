"""The recipes against the paper's Table 4, and configurations through JSON."""

import json
from dataclasses import replace

import fresh
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig
from meanflow.config_json import from_dict, to_dict
from meanflow.errors import UserError
from meanflow.model.build import build_net
from meanflow.objectives.build import OBJECTIVES
from meanflow.presets import PRESETS, preset
from meanflow.training.optim import learning_rate

# paper, Table 4: parameters in millions, GMACs a forward pass, steps, omega, kappa, guidance interval
TABLE_4 = {
    "imagenet-b4": ("B/4", 131, 5.6, 400_320, 1.0, 0.0, (0.0, 1.0)),
    "imagenet-b2": ("B/2", 131, 23.1, 1_200_960, 1.0, 0.5, (0.0, 1.0)),
    "imagenet-m2": ("M/2", 308, 54.0, 1_200_960, 1.0, 0.5, (0.0, 1.0)),
    "imagenet-l2": ("L/2", 459, 80.9, 1_200_960, 0.2, 0.92, (0.0, 0.8)),
    "imagenet-xl2": ("XL/2", 676, 119.0, 1_200_960, 0.2, 0.92, (0.0, 0.75)),
    "imagenet-xl2-plus": ("XL/2", 676, 119.0, 5_004_000, 1.0, 0.5, (0.3, 0.8)),
}


@pytest.mark.parametrize("name, row", TABLE_4.items(), ids=TABLE_4)
def test_recipes_are_the_papers(name, row):
    model, params, gmacs, steps, omega, kappa, interval = row
    config = preset(name)
    assert config.model == ModelConfig.official(model)
    assert (config.train.steps, config.train.batch) == (steps, 256)
    o, a = config.objective, config.optim
    assert (o.omega, o.kappa, (o.guidance_start, o.guidance_end)) == (omega, kappa, interval)
    assert (o.time_mean, o.time_std, o.share_equal, o.norm_p, o.norm_c, o.label_drop) == (
        -0.4,
        1.0,
        0.75,
        1.0,
        0.01,
        0.1,
    )
    assert (a.lr, a.beta1, a.beta2, a.weight_decay, a.warmup_steps, a.ema_decay) == (1e-4, 0.9, 0.95, 0.0, 0, 0.9999)
    with torch.device("meta"):
        net = build_net(config.model)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, abs=0.5)
    assert gmacs_of(net) == pytest.approx(gmacs, rel=0.02)


def gmacs_of(net):
    """Of one sample, on the network's meta tensors."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        t = torch.empty(1)
        net(torch.empty(1, 4, 32, 32), t, t, torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() / 2e9


# paper, Tables 1 and 5 (B/4, 80 epochs): what each row changes, and its FID
TABLES_1_AND_5 = {
    "table1a-0": ("share_equal", 1.0, 328.91),
    "table1a-25": ("share_equal", 0.75, 61.06),
    "table1a-50": ("share_equal", 0.5, 63.14),
    "table1a-100": ("share_equal", 0.0, 67.32),
    "table1b-v01": ("tangent", (0.0, 1.0), 61.06),
    "table1b-v00": ("tangent", (0.0, 0.0), 268.06),
    "table1b-v10": ("tangent", (1.0, 0.0), 329.22),
    "table1b-v11": ("tangent", (1.0, 1.0), 137.96),
    "table1c-t-r": ("time_embedding", "t,r", 61.75),
    "table1c-t-h": ("time_embedding", "t,h", 61.06),
    "table1c-t-r-h": ("time_embedding", "t,r,h", 63.98),
    "table1c-h": ("time_embedding", "h", 63.13),
    "table1d-uniform": ("time_distribution", "uniform", 65.90),
    "table1d-ln-0.2-1": ("time_mean time_std", (-0.2, 1.0), 63.83),
    "table1d-ln-0.2-1.2": ("time_mean time_std", (-0.2, 1.2), 64.72),
    "table1d-ln-0.4-1": ("time_mean time_std", (-0.4, 1.0), 61.06),
    "table1d-ln-0.4-1.2": ("time_mean time_std", (-0.4, 1.2), 61.79),
    "table1e-p0": ("norm_p", 0.0, 79.75),
    "table1e-p0.5": ("norm_p", 0.5, 63.98),
    "table1e-p1": ("norm_p", 1.0, 61.06),
    "table1e-p1.5": ("norm_p", 1.5, 66.57),
    "table1e-p2": ("norm_p", 2.0, 69.19),
    "table1f-omega1": ("omega", 1.0, 61.06),
    "table1f-omega1.5": ("omega", 1.5, 33.33),
    "table1f-omega2": ("omega", 2.0, 20.15),
    "table1f-omega3": ("omega", 3.0, 15.53),
    "table1f-omega5": ("omega", 5.0, 20.75),
    # an effective scale omega / (1 - kappa) of 2
    "table5-kappa0": ("omega kappa", (2.0, 0.0), 20.15),
    "table5-kappa0.5": ("omega kappa", (1.0, 0.5), 19.15),
    "table5-kappa0.8": ("omega kappa", (0.4, 0.8), 19.10),
    "table5-kappa0.9": ("omega kappa", (0.2, 0.9), 18.63),
    "table5-kappa0.95": ("omega kappa", (0.1, 0.95), 19.17),
}
FIDS = {"b4": 61.06, "b2": 6.17, "m2": 5.01, "l2": 3.84, "xl2": 3.43, "xl2-plus": None}


# improved MeanFlow: parameters in millions as trained, and for a sample; GMACs of a sample; FID
IMPROVED = {
    "imf-b2": ("imf-B/2", 145.60, 88.94, 24.8, 3.39),
    "imf-m2": ("imf-M/2", 230.57, 173.91, 49.7, 2.27),
    "imf-l2": ("imf-L/2", 509.75, 409.05, 116.1, 1.86),
    "imf-xl2": ("imf-XL/2", 711.11, 610.42, 174.2, 1.72),
}
# its ladder (B/2, 240 epochs): what differs from MeanFlow's recipe, in the model and in the objective; FIDs with
# guidance (or of a recipe without), and of the same network told not to guide
UNGUIDED = {"kappa": 0.0}
V_HEAD, TOLD = {"head_depth": 8}, {"guidance_input": "interval"}
LADDER = {
    "ladder-meanflow": ({}, UNGUIDED, 32.69, None),
    "ladder-meanflow-guided": ({}, {}, 6.17, None),
    "ladder-boundary": ({}, UNGUIDED | {"direction": "boundary"}, 29.42, None),
    "ladder-boundary-guided": ({}, {"direction": "boundary"}, 5.97, None),
    "ladder-v-head": (V_HEAD, UNGUIDED | {"direction": "v_head"}, 30.76, None),
    "ladder-v-head-guided": (V_HEAD, {"direction": "v_head"}, 5.68, None),
    "ladder-omega": (
        V_HEAD | {"guidance_input": "omega"}, UNGUIDED | {"direction": "v_head", "guidance_input": "omega"},
        5.52, 25.15,
    ),
    "ladder-interval": (V_HEAD | TOLD, UNGUIDED | TOLD | {"direction": "v_head"}, 4.57, 20.95),
    "ladder-in-context": (
        V_HEAD | TOLD | {"conditioning": "in_context"}, UNGUIDED | TOLD | {"direction": "v_head"}, 4.09, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, row", IMPROVED.items(), ids=IMPROVED)
def test_improved_recipes_are_the_papers(name, row):
    model, params, params_sample, gmacs, fid = row
    config = preset(name)
    assert config.model == ModelConfig.official(model) and PRESETS[name].fid == fid
    epoch = 1251
    assert (config.train.steps, config.train.batch) == (640 * epoch, 1024)
    o, a = config.objective, config.optim
    assert (o.guidance_input, o.omega_max, o.omega_power, o.direction) == ("interval", 8.0, 1.0, "v_head")
    assert (o.time_mean, o.time_std, o.share_equal) == (-0.4, 1.0, 0.5)
    assert config.data.scale == 1 and len(config.data.latent_mean) == len(config.data.latent_std) == 4
    assert (o.norm_p, o.norm_c, o.label_drop) == (1.0, 0.01, 0.1)
    assert (a.lr, a.beta1, a.beta2, a.weight_decay, a.ema_decay) == (1e-4, 0.9, 0.95, 0.0, 0.9999)
    assert (learning_rate(a, 0), learning_rate(a, 5 * epoch), learning_rate(a, 10 * epoch)) == (0, 5e-5, 1e-4)
    with torch.device("meta"):
        net, sampler = build_net(config.model), build_net(replace(config.model, head_depth=0))
    assert round(net.parameter_count / 1e6, 2) == params and round(sampler.parameter_count / 1e6, 2) == params_sample
    assert gmacs_of(sampler) == pytest.approx(gmacs, rel=0.01)


def test_the_ladder_is_the_papers():
    base = preset("imagenet-b2")
    for name, (of_model, of_objective, fid, unguided) in LADDER.items():
        model, objective = replace(base.model, **of_model), replace(base.objective, **of_objective)
        assert preset(name) == replace(base, model=model, objective=objective), name
        assert (PRESETS[name].fid, PRESETS[name].fid_unguided) == (fid, unguided)
    improved, last = preset("imf-b2"), preset("ladder-modern")
    assert replace(last, train=replace(last.train, steps=640 * 1251)) == improved
    assert last.train.steps == 240 * 1251 and PRESETS["ladder-modern"].fid == 3.82


# millions of parameters, trained and for a sample, which v's head has no part in
RUNG_SIZES = {
    "v-head": (217.3, 131.1),
    "omega": (218.1, 131.9),
    "interval": (219.7, 133.5),
    "in-context": (146.6, 89.8),
}


@pytest.mark.parametrize("rung, sizes", RUNG_SIZES.items(), ids=RUNG_SIZES)
def test_sizes_of_the_rungs(rung, sizes):
    model = preset(f"ladder-{rung}").model
    with torch.device("meta"):
        nets = build_net(model), build_net(replace(model, head_depth=0))
    assert [round(sum(p.numel() for p in net.parameters()) / 1e6, 1) for net in nets] == list(sizes)


def test_a_run_of_the_first_improved_networks_loads():
    """Before conditions were a choice, theirs were tokens, and all guidance was embedded."""
    config = preset("imf-b2")
    values = to_dict(config)
    for name in ("conditioning", "guidance_input"):
        del values["model"][name]
    assert from_dict(values) == config
    values["objective"]["guidance_input"] = "omega"
    assert from_dict(values).model == config.model


# the other objectives': network, what it is told, steps, batch, rate, betas, weight decay, average, FID in one step
FAMILY = {
    "imagenet-shortcut-b2": ("B/2", "tau,level", 800_000, 256, 1e-4, (0.9, 0.999), 0.1, 0.999, 40.3),
    "imagenet-shortcut-xl2": ("XL/2", "tau,level", 800_000, 256, 1e-4, (0.9, 0.999), 0.1, 0.999, 10.6),
    "imagenet-soflow-b4": ("B/4", "t,h", 400_320, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 11.59),
    "imagenet-soflow-b4-unguided": ("B/4", "t,h", 400_320, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 58.56),
    "imagenet-soflow-b2": ("B/2", "t,h", 1_200_960, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 4.85),
    "imagenet-soflow-m2": ("M/2", "t,h", 1_200_960, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 3.73),
    "imagenet-soflow-l2": ("L/2", "t,h", 1_200_960, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 3.20),
    "imagenet-soflow-xl2": ("XL/2", "t,h", 1_200_960, 256, 1e-4, (0.9, 0.99), 0.0, 0.9999, 2.96),
    "imagenet-ict-xl2": ("XL/2", "t", 800_000, 4096, 1e-4, (0.9, 0.999), 0.0, 0.99993, 34.24),
    "imagenet-imm-xl2": ("XL/2", "t,r", 1_200_000, 4096, 1e-4, (0.9, 0.999), 0.0, 0.9999, 7.77),
    "imagenet-alpha-flow-b2": ("B/2", "t,r", 1_200_960, 256, 1e-4, (0.9, 0.95), 0.0, 0.9999, 5.40),
    "imagenet-alpha-flow-xl2": ("XL/2", "t,r", 1_200_960, 256, 1e-4, (0.9, 0.95), 0.0, 0.9999, 2.95),
    "imagenet-alpha-flow-xl2-plus": ("XL/2", "t,r", 5_004_000, 256, 1e-4, (0.9, 0.95), 0.0, 0.9999, 2.58),
}
OF_PICTURES = {
    f"{data}-{name}"
    for data in ("digits", "fashion")
    for name in ("soflow", "shortcut", "ict", "scm", "imm", "alpha-flow")
}
OPTIONS = {  # where they are not the defaults
    "imagenet-soflow-b4-unguided": {"omega": 1.0},
    "imagenet-alpha-flow-b2": {"anneal_start": 0.0, "anneal_end": 1.0, "share_equal": 0.25, "kappa": 0.5},
    "imagenet-alpha-flow-xl2": {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.75},
    "imagenet-alpha-flow-xl2-plus": {"kappa": 0.5, "guidance_start": 0.3, "guidance_end": 0.8},
}


@pytest.mark.parametrize("name, row", FAMILY.items(), ids=FAMILY)
def test_recipes_of_the_other_objectives_are_their_papers(name, row):
    size, told, steps, batch, lr, betas, decay, average, fid = row
    config, o = preset(name), preset(name).optim
    scale = 1000.0 if "ict" in name or "imm" in name else 1.0
    assert config.model == ModelConfig.official(size, time_embedding=told, time_scale=scale)
    assert (config.train.steps, config.train.batch) == (steps, batch) and PRESETS[name].fid == fid
    assert (o.lr, (o.beta1, o.beta2), o.weight_decay, o.ema_decay) == (lr, betas, decay, average)
    assert o.algorithm == ("radam" if "ict" in name else "adamw") and o.warmup_steps == 0
    assert "shortcut" not in name or (config.train.groups, config.data.flip) == (1, True)
    assert config.objective == type(config.objective)(**OPTIONS.get(name, {}))


def test_small_runs_of_all_objectives_differ_in_the_objective_alone():
    for name in OF_PICTURES:
        config, base = preset(name), preset(name.partition("-")[0])
        told = {key: getattr(base.model, key) for key in ("time_embedding", "time_scale", "log_variance")}
        groups = replace(config.train, groups=base.train.groups)
        like = replace(config, objective=base.objective, model=replace(config.model, **told), train=groups)
        assert like == base, name


def test_every_preset_is_compared():
    names = ("", "-flow-matching", "-imf", "-imf-adaln")
    mine = {f"{data}{name}" for data in ("digits", "fashion") for name in names} | OF_PICTURES
    assert set(PRESETS) - mine == {*TABLE_4, *TABLES_1_AND_5, *IMPROVED, *LADDER, "ladder-modern", *FAMILY}
    assert {name: PRESETS[f"imagenet-{name}"].fid for name in FIDS} == FIDS


@pytest.mark.parametrize("name, row", TABLES_1_AND_5.items(), ids=TABLES_1_AND_5)
def test_ablations_are_the_papers(name, row):
    """A row is the B/4 recipe of 80 epochs but for what the table says."""
    options, values, fid = row
    changes = dict(zip(options.split(), values if " " in options else (values,), strict=True))
    base, config = preset("imagenet-b4"), preset(name)
    model = {"time_embedding": changes.pop("time_embedding")} if "time_embedding" in changes else {}
    assert config.model == replace(base.model, **model)
    assert config.objective == replace(base.objective, **changes)
    assert (config.optim, config.data, config.train) == (base.optim, base.data, base.train)
    assert PRESETS[name].fid == fid


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    config = preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_objective_is_known_wherever_a_configuration_is_read():
    program = """
from meanflow.config_json import from_dict
from meanflow.objective_options import KINDS
print(*sorted(KINDS))
"""
    done = fresh.run_bare(program)
    wanted = sorted(options.kind for options in OBJECTIVES)
    assert done.stdout.split(" ") == [*wanted[:-1], wanted[-1] + "\n"], done.stderr


def test_foreign_configurations_are_refused():
    values = to_dict(preset("digits"))
    values["train"]["speed"] = 11
    with pytest.raises(UserError, match="config.train: got .*speed"):
        from_dict(values)
    del values["train"]["speed"], values["train"]["steps"]
    with pytest.raises(UserError, match="config.train: got .*steps"):
        from_dict(values)
