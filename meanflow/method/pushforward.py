"""The map f_{s,t} of inductive moment matching (IMM, arXiv 2503.07565) from a time t down to s, in its Euler form.

    z_t = (1 - t) x + t sigma_data e                                    noise e ~ N(0, 1), as wide as the data
    f_{s,t}(z) = z - (t - s) sigma_data F,  F = net(z / (sigma_data sqrt((1 - t)^2 + t^2)), s, t | y)

The scale of the data is a unit of measurement alone. With c x and c sigma_data for x and sigma_data, z_t is c z_t, the
network gets the same input, F is the same, and f_{s,t} is c f_{s,t}; distances between samples are in units of
sigma_data. So the paper's latents and noise of standard deviation 0.5, sigma_data = 0.5, are the same method as latents
of standard deviation 1 with our noise, sigma_data = 1, where F is the average velocity from t to s and nothing is
scaled but the network's input.
"""

from collections.abc import Callable

from torch import Tensor

from .edm import scale

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A call of the network by (z, s, t), in z's dtype."""


def noised(x: Tensor, e: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """z_t, like data x and noise e (B, channels, height, width), at times t (B,) of any dtype."""
    return scale(1 - t, x) + scale(t * sigma_data, e)


def push(call: Call, z: Tensor, s: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """f_{s,t}(z), like z (B, channels, height, width), by one call; times s <= t (B,) of any dtype."""
    spread = sigma_data * ((1 - t) ** 2 + t**2).sqrt()
    return z - scale((t - s) * sigma_data, call(scale(1 / spread, z), s.to(z.dtype), t.to(z.dtype)))
