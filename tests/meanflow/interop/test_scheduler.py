"""The scheduler: its step, and what diffusers asks of schedulers."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from meanflow.interop.scheduler import MeanFlowScheduler
from meanflow.method.sampling import sample

SHAPE = (4, 3, 8, 8)


@pytest.fixture
def scheduler():
    return MeanFlowScheduler()


def test_scheduler_step_is_the_average_velocitys(scheduler):
    z, u = torch.rand(SHAPE), torch.rand(SHAPE)
    scheduler.set_timesteps(timesteps=[1, 0.75, 0.25, 0])
    got = scheduler.step(u, scheduler.timesteps[1], z).prev_sample
    torch.testing.assert_close(got, z - 0.5 * u, rtol=0, atol=1e-7)
    assert scheduler.previous_timestep(0.75) == 0.25
    # a step knows its time, not how often it was called
    assert torch.equal(scheduler.step(u, 0.75, z).prev_sample, got)


def test_scheduler_samples_as_the_sampler_does(scheduler):
    def net(z, r, t, y):
        return z * (t + 2 * r + y).reshape(-1, 1, 1, 1)

    noise, y = torch.rand(SHAPE, dtype=torch.float64), torch.arange(4)
    for times in ([1, 0], [1, 2 / 3, 1 / 3, 0], [0.9, 0.1]):
        scheduler.set_timesteps(timesteps=times)
        z = noise
        for t in scheduler.timesteps:
            r = scheduler.previous_timestep(t)
            z = scheduler.step(net(z, *(torch.full((4,), float(x)) for x in (r, t)), y), t, z).prev_sample
        torch.testing.assert_close(z, sample(net, noise, y, times), rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_scheduler_timesteps(scheduler, count):
    scheduler.set_timesteps(count, device="cpu")
    assert len(scheduler) == len(scheduler.timesteps) == scheduler.num_inference_steps == count
    assert scheduler.timesteps.dtype == torch.float32 and scheduler.timesteps.tolist()[0] == 1
    assert scheduler.previous_timestep(scheduler.timesteps[-1]) == 0
    low = [scheduler.previous_timestep(t.bfloat16()) for t in scheduler.timesteps]
    assert low == [scheduler.previous_timestep(t) for t in scheduler.timesteps]


def test_scheduler_saved_and_loaded_steps_alike(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    again = MeanFlowScheduler.from_pretrained(tmp_path)
    other = MeanFlowScheduler.from_config(scheduler.config)
    z, u = torch.rand(SHAPE), torch.rand(SHAPE)
    for each in (scheduler, again, other):
        each.set_timesteps(3)
    results = [each.step(u, each.timesteps[1], z).prev_sample for each in (scheduler, again, other)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert {k: v for k, v in scheduler.config.items() if k != "_use_default_values"} == dict(again.config)


def test_scheduler_carries_a_schedule_of_its_own(tmp_path):
    MeanFlowScheduler(times=[1, 0.6, 0]).save_pretrained(tmp_path)
    again = MeanFlowScheduler.from_pretrained(tmp_path)
    assert again.timesteps.tolist() == torch.tensor([1, 0.6]).tolist() and again.previous_timestep(1) == 0.6
    again.set_timesteps(4)
    assert len(again) == 4
    again.set_timesteps()
    assert len(again) == 2
    with pytest.raises(ValueError, match="times: got"):
        MeanFlowScheduler(times=[0, 1])


def test_scheduler_outputs_equivalence_of_tuple_and_dict(scheduler):
    z, u = torch.rand(SHAPE), torch.rand(SHAPE)
    as_tuple = scheduler.step(u, 1.0, z, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], scheduler.step(u, 1.0, z).prev_sample)
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1
    assert scheduler.scale_model_input(z, 1.0) is z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_scheduler_keeps_shape_and_dtype(scheduler, dtype):
    z, u = torch.rand(SHAPE).to(dtype), torch.rand(SHAPE).to(dtype)
    got = scheduler.step(u, 1.0, z).prev_sample
    assert got.shape == z.shape and got.dtype == dtype
    torch.testing.assert_close(got, (z.double() - u.double()).to(dtype), rtol=0, atol=0)


def test_scheduler_adds_noise_at_any_times(scheduler):
    x, e, t = torch.rand(SHAPE), torch.randn(SHAPE), torch.tensor([0, 0.25, 0.3, 1])
    z = scheduler.add_noise(x, e, t)
    assert torch.equal(z[0], x[0]) and torch.equal(z[3], e[3])
    torch.testing.assert_close(z[1], 0.75 * x[1] + 0.25 * e[1])


def test_scheduler_refuses_what_it_cannot_do(scheduler):
    with pytest.raises(ValueError, match="timesteps: got"):
        scheduler.set_timesteps(2, timesteps=[1, 0])
    for times in ([1], [0, 1], [1, 1, 0], [1.5, 0]):
        with pytest.raises(ValueError, match="times: got"):
            scheduler.set_timesteps(timesteps=times)
    with pytest.raises(ValueError, match="steps: got 0"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(timesteps=[1, 0.5, 0])
    with pytest.raises(ValueError, match=r"timestep: got 0.7, wanted one of \[1.0, 0.5\]"):
        scheduler.step(torch.rand(SHAPE), 0.7, torch.rand(SHAPE))
