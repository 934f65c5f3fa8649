"""Consistency training: iCT (arXiv 2310.14189), and by options ECT (arXiv 2406.14548) and others.

    sigma > sigma' = neighbours of a grid of N(k) levels, or t and r(t) of ECT          noise_levels
    D(x_sigma, sigma) = c_skip x_sigma + c_out net(c_in x_sigma, ln(sigma) / 4),  x_sigma = x + sigma e
    delta = D(x_sigma, sigma) - sg(D(x_sigma', sigma'))                                  same x, e and label
    d = sqrt(|delta|^2 + c^2) - c,  c = 0.00054 sqrt(D)                                  iCT, Eq. 7
    loss = mean(d / (sigma - sigma'))                                                    iCT, Table 1

k is the step, D the elements of a sample. The grid grows finer in the course of a run; shapes do not change.
"""

from functools import lru_cache
from math import floor, log2, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method import edm
from ..method.contract import Objective, Sizes
from ..method.passes import Pass, Passes
from ..recipes.consistency import IctConfig

ECT_K, ECT_B = 8.0, 1.0
"""Of ECT's map t -> r, official."""
ECT_GAP = 1e-6
"""The least t - r of it."""
ECT_MOST = 0.999
"""The largest r / t of its last stages, where t is large."""


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, float64."""

    sigma: Tensor
    """The student's levels (B,)."""
    lower: Tensor
    """The teacher's (B,)."""


class Plan(NamedTuple):
    """Each pass is on every sample."""

    @property
    def sizes(self) -> Sizes:
        """No group of rows."""
        return ()


class IctTerms(NamedTuple):
    """Loss and figures of a batch."""

    loss: Tensor
    raw: Tensor
    """d (B,)."""
    weight: Tensor
    """Its factor (B,)."""
    student: Tensor
    """D(x_sigma, sigma)."""
    teacher: Tensor
    """D(x_sigma', sigma')."""


def level_count(config: IctConfig, step: int, steps: int) -> int:
    """N(k): levels of the grid at a step of a run (iCT, Table 1)."""
    period = floor(steps / (log2(config.s1 // config.s0) + 1))
    return min(config.s0 * 2 ** (step // max(period, 1)), config.s1) + 1


@lru_cache(8)
def grid_of(config: IctConfig, count: int) -> tuple[Tensor, Tensor]:
    """The grid (count,), and the probabilities (count - 1,) of its steps, named by the lower level (iCT, Table 1)."""
    sigma = edm.grid(count, config.sigma_min, config.sigma_max, config.rho)
    erfs = ((sigma.log() - config.p_mean) / (sqrt(2) * config.p_std)).erf().diff()
    return sigma, erfs / erfs.sum()


def noise_levels(config: IctConfig, u: Tensor, step: int, steps: int) -> Drawn:
    """The levels of a step, from uniform numbers u (B,)."""
    if config.pairs == "ect":
        return ect_levels(config, u, step // config.ect_stage_steps)
    sigma, probability = grid_of(config, level_count(config, step, steps))
    index = torch.searchsorted(probability.cumsum(0)[:-1], u.double(), right=True)
    return Drawn(sigma[index + 1], sigma[index])


def ect_levels(config: IctConfig, u: Tensor, stage: int) -> Drawn:
    """t, log-normal and truncated, and r(t) = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)) (ECT, as in FastGen)."""
    low = config.sigma_min
    t = edm.truncated_log_normal(u, config.p_mean, config.p_std, max(low, ECT_GAP), config.sigma_max)
    ratio = min(1 - config.ect_q ** -(stage + 1), ECT_MOST)
    r = (t * (1 - (1 - ratio) * (1 + ECT_K * (-ECT_B * t).sigmoid()))).clamp(min=low)
    return Drawn(torch.where(r >= t - ECT_GAP, r + ECT_GAP, t), r)


def distance(config: IctConfig, delta: Tensor) -> Tensor:
    """d (B,) of a difference (B, channels, height, width)."""
    square = delta.square().flatten(1)
    c = config.huber_c * square.shape[1] ** 0.5
    if config.distance == "l2":
        return square.mean(1)
    if config.distance == "l1":
        return delta.abs().flatten(1).mean(1)
    if config.distance == "huber":
        square = square.sum(1, keepdim=True)
    # sqrt(square + c^2) - c without its loss of digits; the root of 0 has no derivative
    root = (square + c**2).clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    return (square / (root + c)).mean(1)


def weight(config: IctConfig, drawn: Drawn, c_out: Tensor) -> Tensor:
    """The factor of d (B,)."""
    if config.weighting == "gap":
        return 1 / (drawn.sigma - drawn.lower)
    if config.weighting == "c_out":
        return c_out**-2
    return drawn.sigma**-2 + config.sigma_data**-2 if config.weighting == "snr" else torch.ones_like(c_out)


class Ict(Objective):
    """Consistency training as the trainer's objective."""

    config: IctConfig
    watched = {"raw": "raw loss"}
    logged = ("raw", "weight")
    declared = ((),)

    def draw(self, draws: Draws) -> Drawn:
        """Draw the pair of levels of each sample."""
        return noise_levels(self.config, draws.uniform(Purpose.NOISE_LEVEL), draws.step, self.steps)

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """Nothing is left out."""
        return Plan()

    def example(self, sizes: Sizes) -> Plan:
        """The one plan."""
        return Plan()

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """The target, and what is trained: 1 and 3 times a forward pass."""
        weights = "average" if self.config.target_weights == "ema" else "online"
        return {"teacher": Pass(self.batch, weights=weights), "student": Pass(self.batch, trained=True)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> IctTerms:
        """Loss and figures of a batch."""
        config = self.config

        def denoised(name: str, sigma: Tensor) -> tuple[Tensor, Tensor]:
            factors = edm.scalings(sigma.to(x.dtype), config.sigma_data, config.sigma_min, config.scalings)
            x_sigma = x + edm.scale(sigma, e)
            return edm.denoise(lambda z, r, t: passes(name, z, r, t, y), x_sigma, factors), factors.out

        teacher, _ = denoised("teacher", drawn.lower)
        student, c_out = denoised("student", drawn.sigma)
        raw = distance(config, student - teacher)
        factor = weight(config, drawn, c_out).to(raw.dtype)
        return IctTerms((factor * raw).mean(), raw.detach(), factor, student.detach(), teacher)
