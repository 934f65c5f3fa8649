"""Random numbers and times: known answers, distributions, and independence of how the batch is split."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from meanflow.config import DataConfig, ObjectiveConfig
from meanflow.data.dataset import Batch, Order
from meanflow.data.decoder import make_decoder
from meanflow.draws import Draws, Purpose, philox
from meanflow.errors import UserError
from meanflow.method.times import draw_times, drop_mask
from meanflow.presets import preset
from meanflow.training.draw import draw_flips, draw_latents

N = 20_000


def draws(n=N, seed=7, step=3, first=0):
    return Draws(seed, step, torch.arange(first, first + n))


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers of the Random123 library
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox(counter, key, words):
    assert [int(w) for w in philox(tuple(torch.tensor(c) for c in counter), tuple(key))] == words


@pytest.mark.parametrize("purpose", [Purpose.NOISE, Purpose.TIME_B])
def test_normal_and_uniform(purpose):
    assert stats.kstest(draws().normal(purpose, (3,)).flatten(), "norm").pvalue > 0.01
    assert stats.kstest(draws().uniform(purpose, (3,)).flatten(), "uniform").pvalue > 0.01


def test_purposes_steps_seeds_and_samples_are_independent():
    base = draws().normal(Purpose.NOISE)
    others = [
        draws().normal(Purpose.TIME_A),
        draws(step=4).normal(Purpose.NOISE),
        draws(seed=8).normal(Purpose.NOISE),
        draws(seed=7 + 2**40).normal(Purpose.NOISE),
        draws(first=N).normal(Purpose.NOISE),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / N**0.5


def test_a_sample_does_not_depend_on_the_others():
    whole = draws(8).normal(Purpose.NOISE, (2, 5, 5))
    parts = [draws(4, first=first).normal(Purpose.NOISE, (2, 5, 5)) for first in (0, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_logit_normal_times():
    config = ObjectiveConfig(time_mean=-0.4, time_std=1.2, share_equal=0.5)
    r, t = (x.double().numpy() for x in draw_times(config, draws()))

    def cdf(x):
        return stats.norm.cdf((np.log(x) - np.log1p(-x) + 0.4) / 1.2)

    equal = np.arange(N) < N // 2
    # the larger and the smaller of two draws; where r = t too, t is the larger one
    assert stats.kstest(t[equal], lambda x: cdf(x) ** 2).pvalue > 0.01
    assert stats.kstest(t[~equal], lambda x: cdf(x) ** 2).pvalue > 0.01
    assert stats.kstest(r[~equal], lambda x: 1 - (1 - cdf(x)) ** 2).pvalue > 0.01
    assert (r[equal] == t[equal]).all() and (r[~equal] < t[~equal]).all()


def test_uniform_times_and_the_single_draw():
    config = ObjectiveConfig(time_distribution="uniform", share_equal=0.5, equal_time="single")
    r, t = (x.double().numpy() for x in draw_times(config, draws()))
    assert stats.kstest(t[: N // 2], "uniform").pvalue > 0.01
    assert stats.kstest(t[N // 2 :], lambda x: x**2).pvalue > 0.01
    assert (r <= t).all()


def test_bernoulli_placement():
    config = ObjectiveConfig(equal_placement="bernoulli", share_equal=0.3, drop_placement="bernoulli", label_drop=0.2)
    r, t = draw_times(config, draws())
    drop = drop_mask(config, draws().uniform(Purpose.LABEL_DROP))
    for mask, p in ((r == t, 0.3), (drop, 0.2)):
        assert abs(mask.double().mean() - p) < 4 * (p * (1 - p) / N) ** 0.5
        assert abs(mask[: N // 2].double().mean() - p) < 6 * (p * (1 - p) / N) ** 0.5  # not the first ones


def test_official_drop_takes_the_first_labels():
    drop = drop_mask(ObjectiveConfig(label_drop=0.5), torch.tensor([0.9, 0.1, 0.6, 0.2, 0.3]))
    assert drop.tolist() == [True, True, True, False, False]


def test_posterior_is_drawn_scaled_and_flipped():
    batch = Batch(torch.full((N, 1, 1, 2), 2.0), torch.full((N, 1, 1, 2), 3.0), torch.zeros(N).long())
    x = draw_latents(batch, draws(), DataConfig(scale=0.5))
    assert stats.kstest(x.flatten(), "norm", (1.0, 1.5)).pvalue > 0.01
    mean = draw_latents(batch, draws(), DataConfig(scale=0.5, sample_posterior=False))
    assert torch.equal(mean, torch.ones_like(mean))
    half = Batch(batch.mean.half(), batch.std.half(), batch.labels)
    assert torch.equal(draw_latents(half, draws(), DataConfig(scale=0.5)), x)  # computed in fp32
    assert draw_latents(half, draws(), DataConfig(sample_posterior=False)).dtype == torch.float32
    ramp = Batch(torch.tensor([0.0, 1.0]).expand(N, 1, 1, 2), None, batch.labels, draw_flips(draws()))
    flipped = draw_latents(ramp, draws(), DataConfig())[:, 0, 0, 0]
    assert torch.equal(flipped.bool(), ramp.flip) and abs(flipped.mean() - 0.5) < 4 * 0.5 / N**0.5
    parts = [draw_flips(Draws(0, 0, part)) for part in torch.arange(N).split(N // 4)]
    assert torch.equal(torch.cat(parts), draw_flips(Draws(0, 0, torch.arange(N))))


def test_latents_with_statistics_come_back_from_the_decoder(monkeypatch):
    config = DataConfig(scale=0.5, latent_mean=(1.0, -2.0), latent_std=(2.0, 4.0))
    latents = torch.randn(3, 2, 4, 4)
    batch = Batch(latents, torch.zeros_like(latents), torch.zeros(3).long())
    x = draw_latents(batch, draws(3), config)
    mean, std = torch.tensor([[1.0, -2.0], [4.0, 8.0]])[..., None, None]
    torch.testing.assert_close(x, (latents - mean) / std)
    vae = SimpleNamespace(decode=lambda z: SimpleNamespace(sample=z))
    monkeypatch.setattr("meanflow.data.decoder.load_vae", lambda *_: vae)
    torch.testing.assert_close(make_decoder(config, torch.device("cpu"))(x), latents)
    with pytest.raises(UserError, match="data.latent_std: got .*, wanted 2 positive numbers, as data.latent_mean"):
        replace(config, latent_std=(1.0, 0.0))
    run = preset("imagenet-b4")
    with pytest.raises(UserError, match="data.latent_mean: got .*, wanted a number for each of 4 channels, or none"):
        replace(run, data=config)


@pytest.mark.parametrize("drop_last", [True, False])
def test_order_visits_each_sample_once_an_epoch(drop_last):
    order = Order(10, 4, seed=1, drop_last=drop_last)
    seen = np.concatenate([order.indices(step) for step in range(5)])
    if drop_last:
        assert len(set(seen[:8])) == len(set(seen[8:16])) == 8
    else:
        assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    again = Order(10, 4, seed=1, drop_last=drop_last)  # at any step, not only from the first on
    assert (again.indices(3) == order.indices(3)).all()
    assert (Order(10, 4, seed=2, drop_last=drop_last).indices(3) != order.indices(3)).any()


def test_order_within_a_step_of_several_epochs():
    order, seen = Order(5, 4, seed=3, drop_last=False), []
    for step in range(10):
        seen += order.indices(step).tolist()
    epochs = [seen[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert epochs == [np.random.default_rng((3, e)).permutation(5).tolist() for e in range(8)]
