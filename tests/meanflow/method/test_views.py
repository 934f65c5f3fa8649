"""Each objective's own sampler: noise added again by draws, denoisers as velocities, steps that a network knows."""

import pytest
import torch
from torch import nn

from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method import edm
from meanflow.method.sampling import Sampler, even_times, generate, sample, sample_anew
from meanflow.method.views import view_of
from meanflow.recipe import ObjectiveConfig
from meanflow.recipes.consistency import IctConfig, ScmConfig
from meanflow.recipes.flow import ShortcutConfig, SoFlowConfig

SHAPE, Y = (1, 4, 4), torch.arange(5)


class Net(nn.Module):
    """A network that depends on all it is told."""

    in_channels, input_size, num_classes, compute_dtype = *SHAPE[:2], 10, None

    def forward(self, z, r, t, y):
        r, t, y = (x.to(z.dtype)[:, None, None, None] for x in (r, t, y))
        return (z * (1 + t) + 0.3 * r + 0.1 * y).sin() + t


def draws() -> Draws:
    return Draws(3, 0, torch.arange(5, 10))


def noise(index: int) -> torch.Tensor:
    return draws().normal(Purpose.RENOISE, SHAPE, index)


def test_an_average_velocity_is_sampled_as_it_is():
    net, times = Net(), even_times(3)
    assert view_of(ObjectiveConfig(), net) is net
    wanted = sample(net, draws().normal(Purpose.NOISE, SHAPE), Y, times)
    assert torch.equal(generate(net, draws(), SHAPE, Y, times), wanted)


@pytest.mark.parametrize("options", (SoFlowConfig(), IctConfig(), ScmConfig()), ids=lambda options: options.kind)
def test_noise_is_added_again_by_draws_of_each_step(options):
    net = view_of(options, Net())
    first = draws().normal(Purpose.NOISE, SHAPE)
    for steps in (1, 2, 4):
        wanted = sample_anew(Sampler(net), first, Y, even_times(steps), [noise(i) for i in range(steps - 1)])
        assert torch.equal(generate(net, draws(), SHAPE, Y, even_times(steps)), wanted)
    parts = [generate(net, Draws(3, 0, torch.tensor([5 + i])), SHAPE, Y[i : i + 1], even_times(4)) for i in range(5)]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=1e-6, atol=1e-6)


def test_the_noises_of_a_sample_are_independent():
    many = Draws(3, 0, torch.arange(4000))
    parts = [many.normal(Purpose.NOISE, (3,)), *(many.normal(Purpose.RENOISE, (3,), i) for i in range(3))]
    found = torch.corrcoef(torch.cat(parts, 1).T)
    assert (found - torch.eye(12)).abs().max() < 4 / 4000**0.5
    assert torch.equal(many.normal(Purpose.NOISE, (3,), 0), parts[0])


@pytest.mark.parametrize("options", (IctConfig(sigma_data=0.7), ScmConfig(), ScmConfig(time_input="angle")))
def test_denoisers_are_sampled_at_the_levels_of_the_times(options):
    """z = (1 - t) x + t e is x + sigma e, scaled: noise is added to the same share."""
    net = Net()
    denoiser = edm.denoiser(options.denoising, net, Y)
    # from the noise, and at 0.75, 0.5 and 0.25
    levels = [options.sigma_max, 3.0, 1.0, 1 / 3]
    first = draws().normal(Purpose.NOISE, SHAPE)
    wanted = edm.sample_by_renoising(denoiser, first, levels, [noise(i) for i in range(3)])
    found = generate(view_of(options, net), draws(), SHAPE, Y, even_times(4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_shortcuts_are_taken_in_steps_of_their_levels():
    net = view_of(ShortcutConfig(timesteps=8), Net())
    first = draws().normal(Purpose.NOISE, SHAPE)
    for times in (even_times(1), even_times(8), (1.0, 0.5, 0.25, 0.125, 0.0)):
        assert torch.equal(generate(net, draws(), SHAPE, Y, times), sample(Net(), first, Y, times))
    for times in (even_times(3), even_times(16), (1.0, 0.25, 0.0)):
        with pytest.raises(UserError, match="^times: got .*, wanted steps of the lengths 1, 1/2 ... 1/8"):
            generate(net, draws(), SHAPE, Y, times)


def test_a_view_has_the_precision_of_its_network():
    net = Net()
    view_of(IctConfig(), net).compute_dtype = torch.bfloat16
    assert net.compute_dtype == torch.bfloat16
