"""Continuous-time consistency training in TrigFlow: sCM (arXiv 2410.11081), as NVIDIA's FastGen has it by default.

    x_t = cos(t) x + sin(t) sigma_d e,  t = atan(sigma / sigma_d),  dx/dt = cos(t) sigma_d e - sin(t) x
    F = -net(x_t / sigma_d, ln(sigma) / 4),  f = cos(t) x_t - sigma_d sin(t) F                    section 3
    J = cos(t) sin(t) dF/dt, along (dx/dt, 1)                                                     section 4.2
    g = -cos(t)^2 (sigma_d F - dx/dt) - rho (cos(t) sin(t) x_t + sigma_d J),  g <- g / (|g| + c)
    loss = mean(W exp(-w) / D |F - sg(F + g)|^2 + w)                                              Eq. 8

w(t) is a learned log-variance, W = 1 / sigma, D the elements of a sample; rho rises from 0 to 1. FastGen takes the root
mean square of g for its norm, and divides the squared error by D twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method import edm
from ..method.contract import Objective, Sizes
from ..method.passes import Pass, Passes
from ..recipes.consistency import ScmConfig


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, float64."""

    sigma: Tensor
    """Levels (B,)."""
    rho: Tensor
    """Share of the derivative at this step (B,)."""


class Plan(NamedTuple):
    """The one pass is on every sample."""

    @property
    def sizes(self) -> Sizes:
        """No group of rows."""
        return ()


class ScmTerms(NamedTuple):
    """Loss and figures of a batch."""

    loss: Tensor
    raw: Tensor
    """Mean square of F - sg(F + g) over a sample (B,), at most about 1 by the normalisation."""
    each: Tensor
    """The loss of each sample (B,)."""
    log_variance: Tensor
    """w (B,)."""
    f: Tensor
    """The prediction F."""
    j: Tensor
    """cos(t) sin(t) dF/dt."""
    tangent: Tensor
    """g, normalised."""


class Scm(Objective):
    """sCM as the trainer's objective."""

    config: ScmConfig
    watched = {"raw": "raw loss"}
    logged = ("raw", "log_variance")
    declared = ((),)

    def draw(self, draws: Draws) -> Drawn:
        """Draw the level of each sample."""
        return noise_levels(self.config, draws.uniform(Purpose.NOISE_LEVEL), draws.step)

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """Nothing is left out."""
        return Plan()

    def example(self, sizes: Sizes) -> Plan:
        """The one plan."""
        return Plan()

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """One pass with the derivative of every sample: 4 times a forward pass."""
        head = "log_variance" if self.config.log_variance else ""
        return {"primal": Pass(self.batch, self.batch, trained=True, head=head)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> ScmTerms:
        """Loss and figures of a batch."""
        config, scale = self.config, edm.scale
        sigma, data = drawn.sigma, self.config.sigma_data
        root = (sigma**2 + data**2).sqrt()
        cos, sin = data / root, sigma / root  # of t
        x_t = scale(cos, x) + scale(sin * data, e)
        velocity = scale(cos * data, e) - scale(sin, x)

        # along cos sin (dx/dt, 1): ln tan(t) changes by 1 / (cos sin)
        if config.time_input == "log_sigma":
            time, time_dot = sigma.log() / 4, torch.full_like(sigma, 0.25)
        else:
            time, time_dot = (sigma / data).atan(), cos * sin
        time, time_dot = time.to(x.dtype), time_dot.to(x.dtype)
        z, z_dot = x_t / data, scale(cos * sin / data, velocity)
        net, *heads, net_dot = passes("primal", z, torch.zeros_like(time), time, y, tangents=(z_dot, None, time_dot))
        f, j = -net, -net_dot.detach()
        w = heads[0].to(x.dtype) if heads else torch.zeros_like(time)

        g = -scale(cos**2, data * f.detach() - velocity)
        g = g - scale(drawn.rho * cos * sin, x_t) - scale(drawn.rho * data, j)
        square = g.square().flatten(1)
        norm = square.mean(1) if config.norm == "rms" else square.sum(1)
        g = scale(1 / (norm.sqrt() + config.norm_c), g)

        raw = (f - f.detach() - g).square().flatten(1).mean(1)
        weight = (1 / sigma if config.prior_weight else torch.ones_like(sigma)).to(x.dtype)
        elements = square.shape[1] if config.divide_twice else 1
        each = weight * (-w).exp() / elements * raw + w
        return ScmTerms(each.mean(), raw.detach(), each.detach(), w.detach(), f.detach(), j, g)


def noise_levels(config: ScmConfig, u: Tensor, step: int) -> Drawn:
    """The levels of a step, from uniform numbers u (B,)."""
    sigma = edm.truncated_log_normal(u, config.p_mean, config.p_std, config.sigma_min, config.sigma_max)
    rho = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return Drawn(sigma, torch.full_like(sigma, rho))
