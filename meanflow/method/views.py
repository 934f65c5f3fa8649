"""Networks as sampling takes them: an average velocity u(z, r, t | y), whatever their objective has made of them."""

from typing import Any

import torch
from torch import Tensor, nn

from ..objective_options import Denoising, ObjectiveOptions, Pushing
from . import edm
from .pushforward import push


class View(nn.Module):
    """A network to sample from, as it is called.

    Args:
        net: u(z, r, t | y), or what a subclass makes one of.
        renoises: whether several steps go to the data each time and add new noise, instead of from z_t to z_r.
        finest_level: it takes steps of the lengths 2^-k for k up to this level; None: of any length.
    """

    def __init__(self, net: Any, renoises: bool = False, finest_level: int | None = None):
        super().__init__()
        self.net, self.renoises, self.finest_level = net, renoises, finest_level

    @property
    def in_channels(self) -> int:
        """See the network."""
        return self.net.in_channels

    @property
    def input_size(self) -> int:
        """See the network."""
        return self.net.input_size

    @property
    def num_classes(self) -> int:
        """See the network."""
        return self.net.num_classes

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """See the network, where it is set too."""
        return self.net.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.net.compute_dtype = dtype

    def forward(self, z: Tensor, r: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """z (B, channels, height, width), r, t (B,) -> u, like z; conditions: the label and what follows it."""
        return self.net(z, r, t, *conditions)


class Euler(View):
    """A network sampled by Euler's steps along its velocity u(z, t, t), as flow matching is: z - (t - r) u(z, t, t)."""

    def forward(self, z: Tensor, r: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The velocity at t, whatever r."""
        return self.net(z, t, t, *conditions)


class AsVelocity(View):
    """A denoiser as the average velocity u(z, r, t | y), z = (1 - t) x + t e: to r = 0 it is exact.

        u = (z - D(x_sigma, sigma)) / t,  sigma = t / (1 - t),  x_sigma = sigma / t z

    Args:
        net: the network. denoising: says what D makes of it. renoises: see `View`.
    """

    def __init__(self, net: Any, denoising: Denoising, renoises: bool = True):
        super().__init__(net, renoises)
        self.denoising = denoising

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See the base."""
        sigma = (t / (1 - t)).clamp(max=self.denoising.sigma_max)
        denoised = edm.denoiser(self.denoising, self.net, y)(edm.scale(sigma / t, z), sigma)
        return edm.scale(1 / t, z - denoised)


class Guided(View):
    """A network under guidance of a scale, u_null + scale (u - u_null), by one call of twice the samples."""

    def __init__(self, net: Any, scale: float):
        super().__init__(net)
        self.scale = scale

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See the base."""
        null = torch.full_like(y, self.net.num_classes)
        if self.scale == 0:
            return self.net(z, r, t, null)
        u, u_null = self.net(*(torch.cat([a, a]) for a in (z, r, t)), torch.cat([y, null])).chunk(2)
        return u_null + self.scale * (u - u_null)


class Pushforward(View):
    """The map of inductive moment matching as the average velocity: z - (t - r) u pushes z from t to r.

    The sampler's times 1 to 0 are t_max to t_min, evenly, and its samples go from noise of standard deviation 1 to data
    of sigma_data: those at its time t are 1 + t (sigma_data - 1) times smaller than the map's.

    Args:
        net: the network, guided or not. pushing: says what the map makes of it.
    """

    def __init__(self, net: Any, pushing: Pushing):
        super().__init__(net)
        self.pushing = pushing

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See the base; r < t."""
        low, high, data = self.pushing.t_min, self.pushing.t_max, self.pushing.sigma_data

        def at(time: Tensor) -> tuple[Tensor, Tensor]:
            """The map's time, and its samples over the sampler's."""
            return low + time * (high - low), 1 + time * (data - 1)

        (s, unit), (t_, unit_t) = at(r), at(t)
        there = push(lambda z, s, t: self.net(z, s, t, y), edm.scale(unit_t, z), s, t_, data)
        return edm.scale(1 / (t - r), z - edm.scale(1 / unit, there))


def view_of(options: ObjectiveOptions, net: Any) -> Any:
    """A network of an objective as sampling takes it: itself where it is an average velocity over any step."""
    if options.denoising is not None:
        return AsVelocity(net, options.denoising, options.renoises)
    if options.pushing is not None:
        omega = options.pushing.omega
        return Pushforward(net if omega == 1 else Guided(net, omega), options.pushing)
    if options.renoises or options.finest_level is not None:
        return View(net, options.renoises, options.finest_level)
    return net
