"""Samples of improved MeanFlow, and what a step draws, against the official ones."""

from dataclasses import replace

import numpy as np
import oracle_imf as oracle
import pytest
import torch

from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.errors import UserError
from meanflow.method.guidance import GuidanceInputs, arrange_guidance, omega_from_uniform, sampling_guidance
from meanflow.method.sampling import even_times, sample
from meanflow.method.times import arrange_times, drop_mask, equal_prefix
from meanflow.recipe import IMF_SIZES

CASES = oracle.settings(oracle.load("imf_sampling"), "cases")


def setting(data, case, dtype):
    """The network, noise, labels and guidance of a case."""
    net = oracle.network(str(data["params_from"]).removesuffix(".npz"), dtype)
    noise, y = oracle.tensor(data["noise"], dtype), oracle.tensor(data["labels"])

    def each(value):
        # a name stands for an array, a value a sample; the official program holds scalars in fp32
        return oracle.tensor(data[value], dtype) if isinstance(value, str) else torch.full((len(y),), value).to(dtype)

    return net, noise, y, GuidanceInputs(*(each(case[key]) for key in ("omega", "t_min", "t_max")))


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", CASES)
def test_samples(name, mode):
    data, case = oracle.load("imf_sampling"), CASES[name]
    net, noise, y, guidance = setting(data, case, oracle.MODES[mode])
    times = even_times(case["num_steps"])
    assert np.allclose(data[f"{name}/t_steps"], times, rtol=0, atol=1e-7)
    oracle.assert_close(sample(net, noise, y, times, guidance), data[f"{name}/{mode}/samples"], mode, "u", name)


def test_numbers_are_told_to_all_samples():
    """The official best of each size, where nothing is given."""
    net, noise, y, _ = setting(oracle.load("imf_sampling"), next(iter(CASES.values())), torch.float64)
    objective, official = ObjectiveConfig(guidance_input="interval"), ModelConfig.official
    best = {size: sampling_guidance(official(f"imf-{size}/2"), objective) for size in IMF_SIZES}
    assert best == {"B": (8, 0.4, 0.65), "M": (10.5, 0.4, 0.6), "L": (10.5, 0.4, 0.6), "XL": (8, 0.42, 0.62)}
    each = tuple(torch.full((len(y),), value, dtype=torch.float64) for value in best["XL"])
    assert torch.equal(sample(net, noise, y, (1, 0.5, 0), best["XL"]), sample(net, noise, y, (1, 0.5, 0), each))
    assert not torch.equal(sample(net, noise, y, guidance=best["XL"]), sample(net, noise, y, guidance=best["B"]))
    model = official("imf-B/2")
    assert sampling_guidance(model, replace(objective, guidance_input="omega")) == (8,)
    assert sampling_guidance(model, replace(objective, guidance_input="omega"), (3,)) == (3,)
    assert sampling_guidance(model, ObjectiveConfig()) == ()
    for given in ((0.5, 0.4, 0.6), (2.0, 0.6, 0.4), (2.0, 0.4, 1.1)):
        with pytest.raises(UserError, match="guidance: got .* wanted omega of 1 or more, and 0 <= start <= end <= 1"):
            sampling_guidance(model, objective, given)


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}/f64/traj" in oracle.load("imf_sampling")])
def test_trajectory(name):
    data = oracle.load("imf_sampling")
    net, z, y, guidance = setting(data, CASES[name], torch.float64)
    times, trajectory = even_times(CASES[name]["num_steps"]), data[f"{name}/f64/traj"]
    count = trajectory.shape[1]
    z, y, guidance = z[:count], y[:count], guidance.take(slice(0, count))
    for i, wanted in enumerate(trajectory):
        z = sample(net, z, y, times[i : i + 2], guidance)
        oracle.assert_close(z, wanted, "f64", "u", f"step {i}")


CONFIGS = sorted({key.split("/")[1] for key in oracle.load("imf_sampler") if key.startswith("tr/")})


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("name", CONFIGS)
def test_times_and_intervals_from_given_draws(name, mode):
    data, dtype = oracle.load("imf_sampler"), oracle.MODES[mode]
    case = oracle.settings(data, f"tr/{name}/params")
    config = ObjectiveConfig(time_mean=case["P_mean"], time_std=case["P_std"], share_equal=case["data_proportion"])
    draws = (oracle.tensor(data[key], dtype) for key in ("normal_1", "normal_2", "u_w", "u_a", "u_b"))
    first, second, *uniforms = draws
    equal = torch.arange(len(first)) < equal_prefix(config, len(first))
    assert torch.equal(equal, torch.from_numpy(data[f"tr/{name}/fm_mask"]))
    r, t = arrange_times(first, second, equal, config)
    guidance = arrange_guidance(config, *uniforms, equal)
    for key, got in {"t": t, "r": r, "a": guidance.start, "b": guidance.end}.items():
        oracle.assert_close(got, data[f"{mode}/tr/{name}/{key}"], mode, "table", key)


@pytest.mark.parametrize("mode", oracle.MODES)
def test_scales_from_given_draws(mode):
    data, checked = oracle.load("imf_sampler"), 0
    u = oracle.tensor(data["u_w"], oracle.MODES[mode])
    for law, wanted in oracle.group(data, f"{mode}/w/").items():
        config = ObjectiveConfig()
        if law != "default":
            power, most = law.removeprefix("beta").split("_smax")
            config = ObjectiveConfig(omega_power=float(power), omega_max=1 + float(most))
        oracle.assert_close(omega_from_uniform(config, u), wanted, mode, "table", law)
        checked += 1
    assert checked >= 3


def test_count_of_equal_times():
    data = oracle.load("imf_sampler")
    for i, size in enumerate(data["count/bz"]):
        for j, share in enumerate(data["count/data_proportion"]):
            assert equal_prefix(ObjectiveConfig(share_equal=float(share)), int(size)) == data["count/n_fm"][i, j]


def test_dropped_labels():
    data = oracle.load("imf_sampler")
    cases = sorted({key.split("/")[0] for key in data if key.startswith("drop")})
    assert cases
    for case in cases:
        d = oracle.group(data, f"{case}/")
        drop = drop_mask(ObjectiveConfig(label_drop=float(d["prob"])), oracle.tensor(d["drop_u"]))
        assert int(drop.sum()) == int(d["num_drop"])
        labels, v_t, v_g = (oracle.tensor(d[key]) for key in ("labels", "v_t", "v_g"))
        assert torch.equal(torch.where(drop, 10, labels), oracle.tensor(d["y_out"]))
        assert torch.equal(torch.where(drop[:, None, None, None], v_t, v_g), oracle.tensor(d["v_g_out"]))
