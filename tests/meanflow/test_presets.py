"""The recipes against the paper's Table 4, and configurations through JSON."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig, from_dict, to_dict
from meanflow.errors import UserError
from meanflow.presets import PRESETS, preset
from meanflow.engine import build_net

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
        z, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(z, t, t, y)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, abs=0.5)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name):
    config = preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_foreign_configurations_are_refused():
    values = to_dict(preset("digits"))
    values["train"]["speed"] = 11
    with pytest.raises(UserError, match="config.train: got .*speed"):
        from_dict(values)
    del values["train"]["speed"], values["train"]["steps"]
    with pytest.raises(UserError, match="config.train: got .*steps"):
        from_dict(values)
