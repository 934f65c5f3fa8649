"""Consistency training: iCT (arXiv 2310.14189), and by options ECT (arXiv 2406.14548) and others.

    sigma > sigma' = neighbours of a grid of N(k) levels, or t and r(t) of ECT          noise_levels
    D(x_sigma, sigma) = c_skip x_sigma + c_out net(c_in x_sigma, ln(sigma) / 4),  x_sigma = x + sigma e
    delta = D(x_sigma, sigma) - sg(D(x_sigma', sigma'))                                  same x, e and label
    d = sqrt(|delta|^2 + c^2) - c,  c = 0.00054 sqrt(D)                                  iCT, Eq. 7
    loss = mean(d / (sigma - sigma'))                                                    iCT, Table 1

k is the step, D the elements of a sample. The grid grows finer in the course of a run; shapes do not change.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import floor, log2, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..draws import Draws, Purpose
from ..errors import require, require_finite
from ..method import edm
from ..method.contract import Objective, Sizes
from ..method.passes import Pass, Passes
from ..objective_options import ObjectiveOptions

ECT_K, ECT_B = 8.0, 1.0
"""Of ECT's map t -> r, official."""
ECT_GAP = 1e-6
"""The least t - r of it."""
ECT_MOST = 0.999
"""The largest r / t of its last stages, where t is large."""


@dataclass(frozen=True)
class IctConfig(ObjectiveOptions, kind="ict"):
    """Options of consistency training. Defaults are iCT's."""

    sigma_data: float = 0.5
    """Standard deviation of the data as it is trained on."""
    sigma_min: float = 0.002
    """The lowest level."""
    sigma_max: float = 80.0
    """The highest level."""
    p_mean: float = -1.1
    """Mean of ln(sigma), of which the levels' probabilities are made."""
    p_std: float = 2.0
    """Its standard deviation."""
    pairs: Literal["grid", "ect"] = "grid"
    """Neighbours of a grid (iCT), or any t with ECT's r(t)."""
    rho: float = 7.0
    """The grid's levels are evenly spaced in their rho-th root."""
    s0: int = 10
    """The grid has so many steps at the beginning, doubled at even distances in the run."""
    s1: int = 1280
    """And at most so many."""
    ect_q: float = 2.0
    """r / t is about 1 - q^-(stage + 1)."""
    ect_stage_steps: int = 25_000
    """Training steps of one stage (on CIFAR-10 250 x 12,800 images in batches of 128)."""
    scalings: edm.Form = "boundary"
    """c_skip and c_out are 1 and 0 at sigma_min; plain: at 0 (ECT); or as diffusers' training script has them."""
    distance: Literal["huber", "huber_mean", "l2", "l1"] = "huber"
    """d of a sample: pseudo-Huber of its norm, or the mean over its elements of their pseudo-Huber (diffusers' script),
    squares or magnitudes (the original consistency training)."""
    huber_c: float = 0.00054
    """c of the pseudo-Huber distance, times the root of a sample's elements; 0 is the norm itself (ECT)."""
    weighting: Literal["gap", "c_out", "snr", "none"] = "gap"
    """Weight of d: 1 / (sigma - sigma'), or 1 / c_out^2 (ECT on ImageNet), or sigma^-2 + sigma_data^-2, or 1 (both the
    original consistency training)."""
    target_weights: Literal["current", "ema"] = "current"
    """Weights of the target: the ones in training, or their average (the original consistency training)."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("sigma_data", "p_std", "rho"):
            value = getattr(self, name)
            require(value > 0, f"objective.{name}", value, "a positive number", "change it")
        low, high, hint = self.sigma_min, self.sigma_max, "official is 0.002 to 80"
        require(low > 0 or (low == 0 and self.pairs == "ect"), "objective.sigma_min", low, "a positive number", hint)
        require(high > low, "objective.sigma_max", high, f"more than sigma_min = {low}", hint)
        require(self.s0 >= 1, "objective.s0", self.s0, "a positive whole number", "official is 10")
        require(self.s1 >= self.s0, "objective.s1", self.s1, f"at least s0 = {self.s0}", "official is 1280")
        require(self.ect_q > 1, "objective.ect_q", self.ect_q, "a number above 1", "official is 2, or 256")
        steps = self.ect_stage_steps
        require(steps >= 1, "objective.ect_stage_steps", steps, "a positive whole number", "change it")
        require(self.huber_c >= 0, "objective.huber_c", self.huber_c, "zero or more", "official is 0.00054")

    def velocity(self, net: nn.Module) -> nn.Module:
        """See the base."""
        return edm.AsVelocity(net, partial(denoiser, self), self.sigma_max)


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


def denoiser(config: IctConfig, net: nn.Module, y: Tensor) -> edm.Denoiser:
    """D(x, sigma) of a network for labels y (B,): the sample itself, to draw by `edm.sample_by_renoising`."""

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        factors = edm.scalings(sigma, config.sigma_data, config.sigma_min, config.scalings)
        return edm.denoise(lambda z, r, t: net(z, r, t, y), x, factors)

    return denoised


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
