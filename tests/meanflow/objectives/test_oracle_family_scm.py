"""sCM against FastGen's code (tests/data/oracle_family)."""

import pytest
import torch
from oracle_family import MODES, TinyNet, assert_close, assert_gradients, group, load, settings, tensor

from meanflow.method.edm import denoiser, sample_by_renoising
from meanflow.method.passes import Passes, func_jvp
from meanflow.objectives.scm import Plan, Scm, ScmConfig, noise_levels

DATA = load("scm")
CONFIG, CASES, SAMPLES = (settings(DATA, name) for name in ("config", "cases", "sample/cases"))


class WithLogVariance(TinyNet):
    """The tiny network with its head for w."""

    def forward(self, z, r, t, y, head=""):
        out = super().forward(z, r, t, y)
        return (out, (self.features(t) @ self.lv_w + self.lv_b).squeeze(1)) if head else out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, mode):
    case, data, dtype = CASES[name], group(DATA, f"case/{name}/"), MODES[mode]
    config = ScmConfig(
        sigma_data=CONFIG["sigma_data"],
        sigma_min=case["min_t"],
        sigma_max=case["max_t"],
        p_mean=case["p_mean"],
        p_std=case["p_std"],
        warmup_steps=case["tangent_warmup_steps"],
        norm_c=case["tangent_warmup_const"],
        norm="rms" if case["g_norm_spatial_invariance"] else "l2",
        prior_weight=case["prior_weighting_enabled"],
        divide_twice=case["divide_x_0_spatial_dim"],
    )
    net, objective = WithLogVariance(DATA, dtype, lambda r, t: (t,)), Scm(config, case["batch_size"])
    drawn = noise_levels(config, torch.from_numpy(data["u"]), case["iteration"])
    assert (drawn.rho - case["rho"]).abs().max() < 1e-15
    x, e, y = (tensor(data[key], dtype) for key in "xey")
    passes = Passes(objective.passes(()), net, jvp=func_jvp)
    terms = objective.terms(passes, x, e, y, drawn, Plan())
    passes.finish()
    terms.loss.backward()

    t = (drawn.sigma / config.sigma_data).atan()
    cos, sin = (a.to(dtype).reshape(-1, 1, 1, 1) for a in (t.cos(), t.sin()))
    assert_close(drawn.sigma, data["sigma_t"], "f64", "sigma")
    assert_close(t, data["t_hat"], "f64", "t")
    x_t = cos * x + config.sigma_data * sin * e
    found = {
        "loss": terms.loss,
        "loss_per_sample": terms.each,
        "loss_unweighted": terms.raw,
        "logvar": terms.log_variance,
        "F_theta": terms.f,
        "F_theta_jvp": terms.j,
        "x_t_hat": x_t,
        "dxt_dt": config.sigma_data * cos * e - sin * x,
        "x0_pred": denoiser(config.denoising, net, y)(x_t / cos, drawn.sigma.to(dtype)),
        "grad_norm": torch.stack([p.grad.double().norm() for p in net.parameters()]).norm(),
    }
    official = {key: value for key, value in group(data, f"{mode}/").items() if not key.startswith("grad/")}
    assert "loss" in official and official.keys() <= found.keys()
    for key, value in official.items():
        assert_close(found[key], value, mode, key)
    gradients = group(data, f"{mode}/grad/")
    assert gradients or mode == "f32"
    for leaf, value in gradients.items():
        assert_close(net.get_parameter(leaf).grad, value, mode, leaf)
    if mode == "f64":
        assert_gradients(net, gradients, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name, mode):
    dtype = MODES[mode]
    config, net = ScmConfig(sigma_data=CONFIG["sigma_data"]), WithLogVariance(DATA, dtype, lambda r, t: (t,))
    f = denoiser(config.denoising, net, tensor(DATA["sample/labels"]))
    noise, *renoise = (tensor(each, dtype) for each in (DATA["sample/noise"], *DATA["sample/renoise"]))
    sampled = sample_by_renoising(f, noise, SAMPLES[name]["t_list"][:-1], renoise)
    assert_close(sampled, DATA[f"sample/{name}/{mode}/samples"], mode, name)
