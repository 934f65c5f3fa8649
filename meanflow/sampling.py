"""Images from noise: z_r = z_t - (t - r) u(z_t, r, t), from t = 1 to r = 0 in one step or several."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import require


def even_times(num_steps: int) -> tuple[float, ...]:
    """num_steps equal steps from 1 to 0. (The official default schedule takes one step whatever the number.)"""
    require(num_steps >= 1, "num_steps", num_steps, "a positive whole number", "1 is MeanFlow's one-step generation")
    return tuple(1 - i / num_steps for i in range(num_steps)) + (0.0,)


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """The schedule, if it falls strictly within [0, 1].

    Raises:
        UserError: otherwise.
    """
    times = tuple(float(t) for t in times)
    falls = len(times) >= 2 and all(a > b for a, b in zip(times, times[1:], strict=False))
    require(
        falls and times[0] <= 1 and times[-1] >= 0,
        "times", times, "at least two falling times in [0, 1]", "for instance 1 0.5 0",
    )  # fmt: skip
    return times


@torch.no_grad()
def sample(net: nn.Module, noise: Tensor, y: Tensor, times: Sequence[float] = (1.0, 0.0)) -> Tensor:
    """Latents (B, channels, height, width) from noise of the same shape and labels y (B,), without guidance.

    Args:
        times: the schedule, falling from 1 to 0; one evaluation of the network between each two.
    """
    z = noise
    for t, r in zip(times, check_times(times)[1:], strict=False):
        t, r = (torch.full_like(z[:, 0, 0, 0], time) for time in (t, r))
        z = z - (t - r)[:, None, None, None] * net(z, r, t, y)
    return z
