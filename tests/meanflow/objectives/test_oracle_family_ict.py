"""Consistency training against official code: openai's, FastGen's and diffusers' (tests/data/oracle_family)."""

import numpy as np
import pytest
import torch
from oracle_family import MODES, TinyNet, assert_close, assert_gradients, group, load, settings, tensor

from meanflow.method import edm
from meanflow.method.passes import Passes
from meanflow.objectives.ict import (
    Drawn,
    Ict,
    IctConfig,
    Plan,
    grid_of,
    level_count,
    noise_levels,
    weight,
)

DATA = load("ict")
CONFIG, CASES, SAMPLES = (settings(DATA, name) for name in ("config", "cases", "sample/cases"))
GRIDS = sorted(int(key.removeprefix("sigmas/N")) for key in DATA if key.startswith("sigmas/N"))
BAR = {"f64": 1e-10, "f32": 1e-4}  # 1 / (sigma - sigma') takes digits


def options(case: dict) -> IctConfig:
    """A case in our words."""
    same = {
        name: CONFIG[name] for name in ("sigma_data", "sigma_min", "sigma_max", "rho", "s0", "s1", "p_mean", "p_std")
    }
    named = {
        "ict": {},
        "ect": {"pairs": "ect", "scalings": "plain"},
        "diffusers": {"scalings": "diffusers", "distance": "huber_mean"},
        "ct": {"target_weights": "ema"},
    }
    found = same | named[case["kind"]]
    if case["kind"] == "ect":
        found |= {"sigma_min": case["min_t"], "sigma_max": case["max_t"], "ect_q": case["q"]}
        found |= {name: case[name] for name in ("p_mean", "p_std")}
    if case["kind"] == "ct":
        found |= {"distance": case["norm"], "weighting": {"uniform": "none", "karras": "snr"}[case["weight_schedule"]]}
    else:
        found |= {"huber_c": case["huber_c"] / np.prod(CONFIG["shape"]) ** 0.5}
        found |= {"weighting": {"default": "gap", "c_out_sq": "c_out"}[case["weighting"]]}
    return IctConfig(**found)


def levels(case: dict, config: IctConfig, data: dict) -> Drawn:
    """The levels of a case, from its index or uniform numbers."""
    if case["kind"] == "ect":
        return noise_levels(config, torch.from_numpy(data["u"]), case["stage"] * config.ect_stage_steps, 1)
    sigma, _ = grid_of(config, case["N"])
    index = torch.from_numpy(data["index"]).long()
    if case["kind"] == "ct":
        index = case["N"] - 2 - index
    return Drawn(sigma[index + 1], sigma[index])


class Watched(TinyNet):
    """Remembers what it is asked."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = []

    def forward(self, z, r, t, y):
        self.asked.append((z.detach(), t))
        return super().forward(z, r, t, y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, mode):
    case, data, dtype = CASES[name], group(DATA, f"case/{name}/"), MODES[mode]
    config = options(case)
    net, average = (Watched(DATA, dtype, lambda r, t: (t,), weights) for weights in ("params/", "target_params/"))
    objective, drawn = Ict(config, case["batch_size"]), levels(case, config, data)
    passes = Passes(objective.passes(()), net, average)
    x, e, y = (tensor(data[key], dtype) for key in "xey")
    terms = objective.terms(passes, x, e, y, drawn, Plan())
    passes.finish()
    terms.loss.backward()

    if "sigma_t_used" in data:
        assert_close(drawn.sigma, data["sigma_t_used"], "f64", "sigma")
        assert_close(drawn.lower, data["sigma_r_used"], "f64", "lower level")
    if "step" in case:
        assert level_count(config, case["step"], case["K"]) == case["N"]
    (z_r, t_r), (z_t, t_t) = (net if config.target_weights == "current" else average).asked[:1] + net.asked[-1:]
    found = {
        "loss": terms.loss,
        "loss_per_sample": terms.weight * terms.raw,
        "loss_unweighted": terms.raw,
        "D_t": terms.student,
        "D_r": terms.teacher,
        "net_in_student": z_t,
        "net_in_teacher": z_r,
        "c_noise_student": 1000 * t_t,
        "c_noise_teacher": 1000 * t_r,
        "grad_norm": torch.stack([p.grad.double().norm() for p in net.parameters()]).norm(),
    }
    official = {key: value for key, value in group(data, f"{mode}/").items() if not key.startswith("grad/")}
    assert "loss" in official and official.keys() <= found.keys()
    for key, value in official.items():
        assert_close(found[key], value, mode, key, BAR[mode])
    gradients = group(data, f"{mode}/grad/")
    assert gradients or mode == "f32"
    if gradients:
        assert_gradients(net, gradients, mode, BAR[mode])


def test_levels_over_training():
    config, steps = IctConfig(s0=CONFIG["s0"], s1=CONFIG["s1"]), int(DATA["schedule/K"])
    assert [level_count(config, k, steps) for k in DATA["schedule/steps"].tolist()] == DATA["schedule/N"].tolist()
    other = IctConfig(s0=5, s1=100)
    for steps, counts in zip(DATA["schedule/K_other"].tolist(), DATA["schedule/N_other"].tolist(), strict=True):
        assert [level_count(other, 37 * i, steps) for i in range(len(counts))] == counts


@pytest.mark.parametrize("count", GRIDS)
def test_grids(count):
    config = options({"kind": "ict", "huber_c": 0.0, "weighting": "default"})
    sigma, probability = grid_of(config, count)
    assert_close(sigma, DATA[f"sigmas/N{count}"], "f64", "grid")
    assert_close(probability, DATA[f"index_prob/N{count}"], "f64", "law")
    found = weight(config, Drawn(sigma[1:], sigma[:-1]), sigma[1:])
    assert_close(found, DATA[f"loss_weight/N{count}"], "f64", "weight", BAR["f64"])


@pytest.mark.parametrize("step", [0, 399_999])
def test_steps_of_a_grid_are_drawn_by_their_probability(step):
    config, steps = IctConfig(), 400_000
    sigma, probability = grid_of(config, level_count(config, step, steps))
    u = (torch.arange(200_000) + 0.5) / 200_000
    drawn = noise_levels(config, u, step, steps)
    index = torch.searchsorted(sigma, drawn.sigma)
    assert (sigma[index] == drawn.sigma).all() and (sigma[index - 1] == drawn.lower).all()
    share = index.sub(1).bincount(minlength=len(probability)) / len(u)
    assert (share - probability).abs().max() < 1e-5
    ends = noise_levels(config, torch.tensor([0.0, 1 - 2.0**-24]), step, steps)
    assert ends.lower[0] == sigma[0] and ends.sigma[1] <= sigma[-1]


@pytest.mark.parametrize("form", ["boundary", "plain", "diffusers"])
def test_scalings(form):
    sigma = torch.from_numpy(DATA["scalings/sigma"])
    found = edm.scalings(sigma, CONFIG["sigma_data"], CONFIG["sigma_min"], form)
    for factor, name in ((found.skip, "c_skip"), (found.out, "c_out"), (found.into, "c_in")):
        assert_close(factor, DATA[f"scalings/{form}/{name}"], "f64", name)
    assert_close(1000 * found.noise, DATA["scalings/c_noise_x1000"], "f64", "c_noise")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name, mode):
    case, dtype = SAMPLES[name], MODES[mode]
    low, high = CONFIG["sigma_min"], CONFIG["sigma_max"]
    config = IctConfig(sigma_data=CONFIG["sigma_data"], sigma_min=low)
    bounds = {"sigma_min": low, "clip": 1.0 if case["clip"] else None} if case["code"] == "openai" else {}
    if case["code"] == "fastgen":
        falling = case["t_list"][:-1]
    else:
        grid = edm.grid(case["steps"], low, high, CONFIG["rho"]).flip(0)
        # at the last of these indices nothing is added, or denoised again
        falling = grid[(case["ts"] or [0, -1])[:-1]].tolist()
    net = TinyNet(DATA, dtype, lambda r, t: (t,))
    f = edm.denoiser(config.denoising, net, tensor(DATA["sample/labels"]))
    noise, *renoise = (tensor(each, dtype) for each in (DATA["sample/noise"], *DATA["sample/renoise"]))
    sampled = edm.sample_by_renoising(f, noise, falling, renoise, **bounds)
    assert_close(sampled, DATA[f"sample/{name}/{mode}/samples"], mode, name)
