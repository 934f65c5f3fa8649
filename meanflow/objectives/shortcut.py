"""The objective of shortcut models (arXiv 2410.12557): one step of size h as two of size h / 2.

Levels k stand for steps h = 2^-k, the finest for the velocity. In our times (t = 1 is noise, r = t - h):

    z = (t + eps (1 - t)) e + (1 - t) x
    velocity samples:    h = 1 / timesteps,  u_tgt = (1 - eps) e - x
    bootstrap samples:   u1 = u'(z, t - h/2, t | y),  z' = clip(z - h/2 u1),  u2 = u'(z', t - h, t - h/2 | y)
                         u_tgt = clip((u1 + u2) / 2)
    loss = mean (u(z, r, t | y) - u_tgt)^2                                   of all samples and elements

u' has the average of the weights. The official code's time is 1 - t and its velocity -u; a network is told the same by
the time embedding "tau,level". x is data, e noise. Tensors are (B, channels, height, width), times and losses (B,).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method.contract import Figures, Objective, Sizes
from ..method.passes import Pass, Passes
from ..method.times import column
from ..recipes.flow import ShortcutConfig


def bootstrap_levels(config: ShortcutConfig, count: int) -> tuple[Tensor, int]:
    """The levels of so many bootstrap samples (count,) int64, from fine to coarse, and how many of them are guided.

    Each level gets as many samples; what is left over, which may be all, gets level 0.
    """
    levels, finest = torch.zeros(count, dtype=torch.long), config.finest_level
    each = (count // 2 if config.level_bias else count) // finest
    dealt = torch.arange(finest - 1, 1 if config.level_bias else -1, -1).repeat_interleave(each)
    if config.level_bias:
        dealt = torch.cat([dealt, torch.ones(count // 4, dtype=torch.long)])
    levels[: len(dealt)] = dealt
    return levels, each if config.guide and config.omega > 0 else 0


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, (B,) each."""

    r: Tensor
    t: Tensor
    bootstrap: Tensor
    """Who learns from two half steps, bool; they come first."""
    guided: Tensor
    """Whose half steps are guided, bool."""
    drop: Tensor
    """Who trains on the null class, bool."""


class Plan(NamedTuple):
    """The rows of the half steps, for B samples: those of bootstrap samples, and once more without a label of guided
    ones.
    """

    image: Tensor
    """The image and label of each sample (B,) int64."""
    half: Tensor
    """The sample of each row with a label (n,) int64. Padding repeats one."""
    null: Tensor
    """The row of half that is repeated without a label (m,) int64."""
    half_row: Tensor
    """A bootstrap sample's row (B,) int64."""
    null_row: Tensor
    """A guided row's row without a label (n,) int64, or -1."""

    @property
    def sizes(self) -> Sizes:
        """Rows of a half step with a label and without."""
        return len(self.half), len(self.null)


class Terms(NamedTuple):
    """Loss and figures of a batch."""

    loss: Tensor
    raw: Tensor
    """Mean squared error of a sample (B,)."""
    bootstrap: Tensor
    """Who learns from two half steps (B,) bool."""
    z: Tensor
    u: Tensor
    u_tgt: Tensor
    u_first: Tensor
    """The first half steps' velocities as the network gives them, those without a label last."""
    u_second: Tensor
    """The second ones'."""
    z_half: Tensor
    """Where the first half step leads, clipped."""


def arrange_times(config: ShortcutConfig, levels: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """r and t (B,) of steps of some levels that begin at a grid's points, index (B,) of which are behind noise."""
    h = torch.exp2(-levels.to(dtype))
    # velocity samples are on the finest grid, like all numbers here exact
    t = 1 - index.to(dtype) * h
    return t - h, t


class Shortcut(Objective):
    """Shortcut models as the trainer's objective."""

    config: ShortcutConfig
    watched = {"raw": "raw loss"}
    logged = ("raw", "raw_velocity", "raw_bootstrap")

    def __init__(self, config: ShortcutConfig, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        super().__init__(config, batch, groups, micro_batches, steps)
        size, parts = self.split.group_size, range(micro_batches)
        self._levels, guided = bootstrap_levels(config, size // config.bootstrap_every)
        # of all micro-batches, which have the same shapes
        half, null = (max(self.split.prefix(first, each) for each in parts) for first in (len(self._levels), guided))
        self._declared, self._guided = ((half, null),), guided

    def draw(self, draws: Draws) -> Drawn:
        """Draw times on the levels' grids, and dropped labels."""
        sample, count = torch.arange(len(draws.samples)), len(self._levels)
        levels = torch.full_like(sample, self.config.finest_level)
        levels[:count] = self._levels
        index = (draws.uniform(Purpose.TIME_A).double() * 2.0**levels).long()
        drop = (draws.uniform(Purpose.LABEL_DROP) < self.config.dropped) & (sample >= count)
        if self.config.omega == 0:
            drop = torch.ones_like(drop)
        times = arrange_times(self.config, levels, index, torch.float32)
        return Drawn(*times, sample < count, sample < self._guided, drop)

    @property
    def declared(self) -> tuple[Sizes, ...]:
        """Rows of a half step: of all bootstrap samples, and of the guided ones without a label."""
        return self._declared

    def need(self, drawn: Drawn, sizes: Sizes) -> int:
        """Rows of a half step with a label, then without."""
        return int((drawn.guided if sizes else drawn.bootstrap).sum())

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """The plan with so many rows."""
        sample = torch.arange(self.batch)
        bootstraps, guided = int(drawn.bootstrap.sum()), int(drawn.guided.sum())
        # bootstrap samples come first, guided ones before all
        image = sample
        if self.config.reuse_images:
            image = torch.where(drawn.bootstrap, sample, sample - bootstraps)
        row, null = torch.arange(sizes[0]), torch.arange(sizes[1])
        null_row = torch.where(row < guided, row, -1)
        return Plan(image, row % max(bootstraps, 1), null % max(guided, 1), sample % max(sizes[0], 1), null_row)

    def example(self, sizes: Sizes) -> Plan:
        """A plan of given sizes."""
        sample, row, null = (torch.arange(count) for count in (self.batch, *sizes))
        return Plan(sample, row, null, sample % max(sizes[0], 1), torch.where(row < sizes[1], row, -1))

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """Two half steps and the trained pass."""
        half = Pass(sum(sizes), weights=self.config.bootstrap_weights)
        return {"first": half, "second": half, "primal": Pass(self.batch, trained=True)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> Terms:
        """See the module."""
        config, bound = self.config, self.config.clip
        x, y, t = x[plan.image], y[plan.image], column(drawn.t, x)
        y = torch.where(drawn.drop, passes.null_label, y)
        z = (t + config.path_eps * (1 - t)) * e + (1 - t) * x
        u_tgt, u_first, u_second, z_half = (1 - config.path_eps) * e - x, z[:0], z[:0], z[:0]

        if len(plan.half):
            start, end = drawn.t[plan.half], drawn.r[plan.half]
            middle, labels = (start + end) / 2, y[plan.half]

            def half_step(name: str, z: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
                """The network's velocities, and the guided ones."""
                labels_of_all = torch.cat([labels, torch.full_like(plan.null, passes.null_label)])
                u = passes(name, *(torch.cat([a, a[plan.null]]) for a in (z, r, t)), labels_of_all)
                cond, nulls = u[: len(plan.half)], u[len(plan.half) :]
                if not len(plan.null):
                    return u, cond
                null = nulls[plan.null_row.clamp(min=0)]
                guided = null + config.omega * (cond - null)
                return u, torch.where(column(plan.null_row >= 0, cond), guided, cond)

            u_first, u1 = half_step("first", z[plan.half], middle, start)
            z_half = (z[plan.half] - column(start - middle, z) * u1).clamp(-bound, bound)
            u_second, u2 = half_step("second", z_half, end, middle)
            target = ((u1 + u2) / 2).clamp(-bound, bound)
            u_tgt = torch.where(column(drawn.bootstrap, z), target[plan.half_row], u_tgt)

        u = passes("primal", z, drawn.r, drawn.t, y)
        raw = (u - u_tgt).square().flatten(1).mean(1)
        return Terms(raw.mean(), raw.detach(), drawn.bootstrap, z, u.detach(), u_tgt, u_first, u_second, z_half)

    def figures(self, terms: Terms) -> Figures:
        """Of all samples, of those who learn the velocity, and of the others."""
        raw, of = terms.raw, terms.bootstrap
        return {"raw": (raw, None), "raw_velocity": (raw, ~of), "raw_bootstrap": (raw, of)}
