"""Inductive moment matching: IMM (arXiv 2503.07565), whose samples of a set are compared as two small crowds.

    t, s < r <= t, one of each a set of M samples                        arrange_times
    A = f_{s,t}(z_t | y or null),  B = sg(f_{s,r}(z_r | y))              same x and e, same weights, B in fp32
    K(a, b) = exp(-w |a - b| / D),  w = 1 / ((t - s) sigma_data)         Laplace kernel
    raw = mean K(A, A) + mean K(B, B) - 2 mean K(A, B)                   means over all M^2 pairs of a set
    loss = mean(W(t) raw)

    W(t) = 1/2 sigmoid(b - l) (-dl/dt) (1 - t)^a / ((1 - t)^2 + t^2),  l = 2 ln((1 - t) / t)

f_{s,t} and z_t are those of method/pushforward.py, which says how they depend on the data's scale. D is the number of
elements of a sample, and |a - b| at least 2e-4 sigma_data. mean K(B, B) has no gradient, but with it raw is a squared
distance, zero where A = B. A set's samples are neighbours in the data's order, which is shuffled: their classes differ,
and their kernels are taken all the same. s < t always, but s = r where t and s are near: then B is z_s.
"""

from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method.contract import Objective, Sizes
from ..method.edm import LEAST, truncated_log_normal
from ..method.passes import Pass, Passes
from ..method.pushforward import noised, push
from ..recipes.consistency import ImmConfig

LEAST_DISTANCE = 2e-4
"""Least distance of two samples, in units of sigma_data: the root of 0 has no derivative."""


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, (B,) each; times in float64, the same in a set."""

    s: Tensor
    r: Tensor
    t: Tensor
    drop: Tensor
    """Who trains on the null class, bool."""


class Plan(NamedTuple):
    """Each pass is on every sample."""

    @property
    def sizes(self) -> Sizes:
        """No group of rows."""
        return ()


class ImmTerms(NamedTuple):
    """Loss and figures of a batch, of n = B / M sets."""

    loss: Tensor
    raw: Tensor
    """Squared distance of A and B (n,), from 0 to 2."""
    weight: Tensor
    """W(t) (n,)."""
    a: Tensor
    """f_{s,t}(z_t)."""
    b: Tensor
    """f_{s,r}(z_r)."""


def arrange_times(config: ImmConfig, u_t: Tensor, u_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform numbers (B,) on [0, 1) to the times s, r and t (B,), float64."""
    low, high = config.t_min, config.t_max
    # on (0, 1], so that s < t
    u_t, u_s = 1 - u_t.double(), u_s.double()
    first, last = low / (1 - low), high / (1 - high)
    if config.time_law == "uniform":
        t = low + (high - low) * u_t
        eta = t / (1 - t)
    else:
        eta = truncated_log_normal(u_t, config.p_mean, config.p_std, max(first, LEAST), last)
        t = eta / (1 + eta)
    s = low + (t - low) * u_s
    # a step down in eta = t / (1 - t)
    eta = (eta - (last - first) / 2**config.gap_power).clamp(min=0)
    return s, torch.maximum(s, eta / (1 + eta)), t


def weight(config: ImmConfig, t: Tensor) -> Tensor:
    """W(t), like times t.

    With -dl/dt = 2 / (t (1 - t)) and sigmoid(b - l) = t^2 / (t^2 + e^-b (1 - t)^2), it has no pole at t = 0.
    """
    rest = 1 - t
    sigmoid_over_square = 1 / (t**2 + exp(-config.weight_b) * rest**2)
    return t * rest ** (config.weight_a - 1) * sigmoid_over_square / (rest**2 + t**2)


def mean_kernel(a: Tensor, b: Tensor, gap: Tensor) -> Tensor:
    """Mean of K over the pairs of each set (n,), of samples a and b (n, M, D) over sigma_data, and t - s (n,)."""
    square = (a[:, :, None] - b[:, None]).square().sum(-1).clamp(min=LEAST_DISTANCE**2)  # (n, M, M)
    return torch.exp(square.sqrt() / (-a.shape[-1] * gap[:, None, None])).mean((1, 2))


class Imm(Objective):
    """IMM as the trainer's objective."""

    config: ImmConfig
    watched = {"raw": "raw loss"}
    logged = ("raw", "weight")
    declared = ((),)

    def __init__(self, config: ImmConfig, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        self.set_size = config.set_size
        super().__init__(config, batch, groups, micro_batches, steps)

    def draw(self, draws: Draws) -> Drawn:
        """Draw a set's times by its first sample, and each sample's dropped label."""
        of_set = Draws(draws.seed, draws.step, draws.samples - draws.samples % self.set_size)
        times = arrange_times(self.config, of_set.uniform(Purpose.TIME_A), of_set.uniform(Purpose.TIME_B))
        return Drawn(*times, draws.uniform(Purpose.LABEL_DROP) < self.config.label_drop)

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """Nothing is left out."""
        return Plan()

    def example(self, sizes: Sizes) -> Plan:
        """The one plan."""
        return Plan()

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """The target in fp32, and what is trained: 1 and 3 times a forward pass."""
        return {"target": Pass(self.batch, precision="fp32"), "primal": Pass(self.batch, trained=True)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> ImmTerms:
        """See the module."""
        config, data = self.config, self.config.sigma_data

        def pushed(name: str, t: Tensor, y: Tensor) -> Tensor:
            """f_{s,t}(z_t) by a pass."""
            z = noised(x, e, t, data)
            return push(lambda z, s, t: passes(name, z, s, t, y), z, drawn.s, t, data)

        b = pushed("target", drawn.r, y)
        a = pushed("primal", drawn.t, torch.where(drawn.drop, passes.null_label, y))

        # the two crowds of each set
        t, s = (time[:: self.set_size] for time in (drawn.t, drawn.s))
        gap = (t - s).to(x.dtype)
        crowd_a, crowd_b = ((f / data).reshape(len(t), self.set_size, -1) for f in (a, b))
        raw = mean_kernel(crowd_a, crowd_a, gap) + mean_kernel(crowd_b, crowd_b, gap)
        raw = raw - 2 * mean_kernel(crowd_a, crowd_b, gap)
        factor = weight(config, t).to(raw.dtype)
        return ImmTerms((factor * raw).mean(), raw.detach(), factor, a.detach(), b)
