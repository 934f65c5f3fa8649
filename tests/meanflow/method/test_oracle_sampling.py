"""Samples in one and several steps, and the time samplers, against the official ones."""

import numpy as np
import oracle
import pytest
import torch

from meanflow.config import ObjectiveConfig
from meanflow.draws import Draws
from meanflow.method.sampling import even_times, sample
from meanflow.method.times import arrange_times, draw_times, equal_prefix

SCHEDULES = sorted({key.split("/")[0] for key in oracle.load("sampling") if key.endswith("f64/samples")})


@pytest.mark.parametrize("mode", oracle.MODES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samples(schedule, mode):
    data, dtype = oracle.load("sampling"), oracle.MODES[mode]
    net = oracle.network(str(data["params_from"]).removesuffix(".npz"), dtype)
    noise, y = oracle.tensor(data["noise"], dtype), oracle.tensor(data["labels"])
    times = data[f"{schedule}/t_steps"].tolist()
    oracle.assert_close(sample(net, noise, y, times), data[f"{schedule}/{mode}/samples"], mode, "u", schedule)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if f"{s}/f64/traj" in oracle.load("sampling")])
def test_trajectory(schedule):
    data = oracle.load("sampling")
    net = oracle.network(str(data["params_from"]).removesuffix(".npz"), torch.float64)
    times, trajectory = data[f"{schedule}/t_steps"].tolist(), data[f"{schedule}/f64/traj"]
    count = trajectory.shape[1]
    z, y = oracle.tensor(data["noise"], torch.float64)[:count], oracle.tensor(data["labels"])[:count]
    for i, wanted in enumerate(trajectory):
        z = sample(net, z, y, times[i : i + 2])
        oracle.assert_close(z, wanted, "f64", "u", f"step {i}")


def test_even_times_are_the_official_multi_step_schedules():
    data = oracle.load("sampling")
    plain = [schedule for schedule in SCHEDULES if schedule.removeprefix("steps").isdigit()]
    assert plain
    for schedule in plain:
        times = even_times(int(data[f"{schedule}/num_steps"]))
        assert np.allclose(data[f"{schedule}/t_steps"], times, rtol=0, atol=1e-7)


def test_official_default_schedule_takes_one_step():
    # the official code clamps the missing times: any number of steps equals one; here even_times gives real ones
    data = oracle.load("sampling")
    for key, difference in data.items():
        if key.endswith("max_diff_to_steps1"):
            assert float(difference) == 0
    assert len(even_times(3)) == 4


def sampler_config(name: str) -> ObjectiveConfig:
    """ "logit_normal_m-0.4_s1_dp0.75" in our words."""
    parts = name.split("_")
    share = float(parts[-1].removeprefix("dp"))
    if parts[0] == "uniform":
        return ObjectiveConfig(time_distribution="uniform", share_equal=share)
    mean, std = float(parts[2].removeprefix("m")), float(parts[3].removeprefix("s"))
    return ObjectiveConfig(time_mean=mean, time_std=std, share_equal=share)


def test_times_from_given_draws():
    data = oracle.load("sampler_map")
    names = sorted({key.split("/")[0] for key in data if key.endswith("/t")})
    assert len(names) >= 3
    for name in names:
        config = sampler_config(name)
        kind = "uniform" if config.time_distribution == "uniform" else "normal"
        a, b = oracle.tensor(data[f"{kind}_a"]), oracle.tensor(data[f"{kind}_b"])
        equal = torch.arange(len(a)) < equal_prefix(config, len(a))
        r, t = arrange_times(a, b, equal, config)
        oracle.assert_close(t, data[f"{name}/t"], "f32", "table", name)
        oracle.assert_close(r, data[f"{name}/r"], "f32", "table", name)
        assert torch.equal(t[equal], r[equal])


def test_count_of_equal_times():
    data = oracle.load("sampler_map")
    for i, batch in enumerate(data["count/bz"]):
        for j, share in enumerate(data["count/data_proportion"]):
            count = equal_prefix(ObjectiveConfig(share_equal=float(share)), int(batch))
            assert count == data["count/n_equal"][i, j], (batch, share)


def test_sampler_statistics():
    data = oracle.load("sampler_stats")
    levels = torch.from_numpy(data["levels"])
    names = sorted({key.split("/")[0] for key in data if "/" in key})
    draws = Draws(seed=1, step=0, samples=torch.arange(400_000))
    assert len(names) >= 3
    for name in names:
        config, official = sampler_config(name), oracle.group(data, f"{name}/")
        r, t = (times.double() for times in draw_times(config, draws))
        unequal = r != t
        share = float(unequal.double().mean())
        assert share == pytest.approx(1 - float(official["frac_equal"]), abs=1e-4)
        got = {"t_all": t, "r_all": r}
        if unequal.any():
            got |= {"t_ne": t[unequal], "r_ne": r[unequal], "gap_ne": (t - r)[unequal]}
        if not unequal.all():
            got["t_eq"] = t[~unequal]
        for key, values in got.items():
            if key not in official:
                continue
            # the spread of our quantiles is the official one's, scaled to our smaller sample
            scale = (float(data["draws_per_call"]) * float(data["calls"]) / len(t)) ** 0.5
            error = (torch.quantile(values, levels) - torch.from_numpy(official[key])).abs()
            bar = 5 * (1 + scale) * torch.from_numpy(official[f"{key}_se"]) + 1e-6
            assert (error <= bar).all(), (name, key)
