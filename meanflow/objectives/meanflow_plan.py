"""Draws and plans of MeanFlow's step: which samples of a batch need which pass of the network. And the first pass.

The official step runs every pass on every sample. Much of that is multiplied by zero or computed twice: where r = t
the factor of the derivative is zero and u(z, t, t | y) is the primal pass itself; without a label, or outside the
guidance interval, no guidance is used. A plan says what is left. It is made on the host from the times and dropped
labels, before the device is asked for anything.

A group's size decides the shapes of a step, so groups are padded to a few declared sizes: whoever compiles or captures
the step knows all of them beforehand. Processes that replay one captured step together take the same sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..errors import require
from ..method.contract import Objective, Sizes
from ..method.guidance import GuidanceInputs, draw_guidance, told_to
from ..method.passes import Passes
from ..method.times import column, draw_times, drop_mask, equal_prefix
from ..recipe import ObjectiveConfig

SIZES_PER_BATCH = 8
"""Groups grow in steps of an eighth of the batch: padding then costs a sixteenth of a forward pass on average."""
SIZES_WITH_PREDICTIONS = 16
"""The same where the derivative's direction is predicted, which takes more rows."""


class Plan(NamedTuple):
    """A step's passes, for B samples in planned order: those that need no derivative come first."""

    tangent: Tensor
    """Samples that get the derivative (n,) int64, last in the order; all others have r = t. Only its length is read,
    a size that the compiler sees."""
    order: Tensor | None
    """The planned order (B,) int64; None if the batch is in it already."""
    guided: Tensor
    """Whether a sample's target is guided (B,) bool."""
    rows: Tensor
    """The sample of each row of the guidance forward (G,) int64. Padding repeats one."""
    null: Tensor
    """Whether a row of the guidance forward uses the null class (G,) bool."""
    null_row: Tensor
    """The row of a guided sample's u(z, t, t | null) (B,) int64."""
    cond_row: Tensor
    """The row of its u(z, t, t | y) (B,) int64, or -1 where that is the primal pass, or is not needed."""

    @property
    def tangent_start(self) -> int:
        """Index of the first sample that gets the derivative."""
        return len(self.guided) - len(self.tangent)

    @property
    def sizes(self) -> Sizes:
        """Samples with a derivative, and rows of the guidance forward."""
        return len(self.tangent), len(self.rows)


def guided_mask(config: ObjectiveConfig, t: Tensor, drop: Tensor, inputs: GuidanceInputs | None = None) -> Tensor:
    """Which samples are guided (B,): t within the interval, both ends included, and the label not dropped."""
    start, end = config.guidance_start, config.guidance_end
    if config.guidance_input == "interval":
        start, end = inputs.start, inputs.end
    inside = (start <= t) & (t <= end)
    if not config.guided:
        inside = torch.zeros_like(inside)
    return inside if config.guide_dropped else inside & ~drop


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise."""

    r: Tensor
    t: Tensor
    """Times (B,)."""
    drop: Tensor
    """Who trains on the null class (B,) bool."""
    guidance: GuidanceInputs | None = None
    """What the network is told of its guidance, where it is told."""


class PlannedMeanFlow(Objective):
    """MeanFlow's work on the host, before the device is asked for anything: its draws, sizes and plans."""

    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        super().__init__(config, batch, groups, micro_batches, steps)
        first, all_of_them = equal_prefix(config, self.split.group_size), range(micro_batches)
        # those of all micro-batches, for processes warm up together
        self._prefixes = {self.split.prefix(first, micro_batch) for micro_batch in all_of_them}
        # torch specialises a compiled region on a dimension of one
        sizes = SIZES_WITH_PREDICTIONS if config.predicts_direction else SIZES_PER_BATCH
        self.granule = max(2, -(-self.batch // sizes))
        tangents, guidance = self._tangent_sizes(), self._guidance_sizes()
        self._declared = tuple((n, rows) for n in reversed(tangents) for rows in reversed(guidance))

    def draw(self, draws: Draws) -> Drawn:
        """Draw times, dropped labels, and the guidance of a network that is told of it."""
        r, t = draw_times(self.config, draws)
        drop = drop_mask(self.config, draws.uniform(Purpose.LABEL_DROP))
        return Drawn(r, t, drop, draw_guidance(self.config, draws, r == t))

    @property
    def declared(self) -> tuple[Sizes, ...]:
        """Sizes of the derivative and of the guidance forward."""
        return self._declared

    def _multiples(self, most: int) -> tuple[int, ...]:
        return (*range(0, most, self.granule), most)

    def _tangent_sizes(self) -> tuple[int, ...]:
        if self.config.equal_placement == "first":
            return tuple(sorted(self.batch - prefix for prefix in self._prefixes))
        return self._multiples(self.batch)

    def _guidance_sizes(self) -> tuple[int, ...]:
        config, tangents = self.config, self._tangent_sizes()
        derived = tangents[-1]
        conditional = derived if config.predicts_direction else 0
        if config.mixes_conditional:
            conditional = self.batch if config.guide_dropped or not self._primal_serves else derived
        most = (self.batch if config.guided else 0) + conditional
        if not most:
            return (0,)
        always = (config.guidance_start, config.guidance_end) == (0, 1) and config.guidance_input != "interval"
        if (not config.guided or (always and config.label_drop == 0)) and len(tangents) == 1:
            return (most,)
        # size 0 is left out: one shape fewer to compile, and under FSDP all ranks must run the same number of forwards
        return self._multiples(most)[1:]

    @property
    def _primal_serves(self) -> bool:
        """Whether the primal pass, where r = t, is the conditional prediction: only if the current weights guide."""
        return self.config.guidance_weights == "current"

    def need(self, drawn: Drawn, sizes: Sizes) -> int:
        """Samples with a derivative, first: they decide who needs a conditional prediction; then guidance's rows.

        Raises:
            UserError: for another batch size, or r < t where the configuration promises r = t.
        """
        if not sizes:
            return self._tangents(drawn)
        guided, conditional, _ = self._masks(drawn, self.batch - sizes[0])
        return int(guided.sum() + conditional.sum())

    def _tangents(self, drawn: Drawn) -> int:
        unequal, count = drawn.r != drawn.t, len(drawn.t)
        require(count == self.batch, "batch", count, f"the plan's {self.batch}", "make an objective for each size")
        if self.config.equal_placement == "bernoulli":
            return int(unequal.sum())
        known = [prefix for prefix in self._prefixes if not unequal[:prefix].any()]
        wanted = f"r = t in the first {min(self._prefixes)} samples"
        require(len(known) > 0, "r", "r < t", wanted, "set objective.equal_placement to bernoulli")
        return self.batch - max(known)

    def _masks(self, drawn: Drawn, tangent_start: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Who is guided and who needs a conditional prediction, each (B,) bool in planned order, and that order."""
        guided, drop, order = guided_mask(self.config, drawn.t, drawn.drop, drawn.guidance), drawn.drop, None
        if self.config.equal_placement == "bernoulli":
            order = (drawn.r != drawn.t).int().argsort(stable=True)
            guided, drop = guided[order], drop[order]
        derived, conditional = torch.arange(self.batch) >= tangent_start, guided & self.config.mixes_conditional
        if self._primal_serves:
            conditional &= derived | drop
        if self.config.predicts_direction:
            conditional |= derived
        return guided, conditional, order

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """The plan with so many samples with a derivative, and rows of the guidance forward."""
        tangents, size = sizes
        guided, conditional, order = self._masks(drawn, self.batch - tangents)
        sample = torch.arange(self.batch)
        null = sample[guided]
        rows = torch.cat([null, sample[conditional]])
        padding = size - len(rows)
        null_row, cond_row = torch.zeros_like(sample), torch.full_like(sample, -1)
        null_row[null] = torch.arange(len(null))
        cond_row[conditional] = torch.arange(len(null), len(rows))
        return Plan(
            tangent=sample[self.batch - tangents :],
            order=order,
            guided=guided,
            rows=torch.cat([rows, rows.new_zeros(padding)]),
            null=torch.arange(len(rows) + padding) < len(null),
            null_row=null_row,
            cond_row=cond_row,
        )

    def example(self, sizes: Sizes) -> Plan:
        """A plan of given sizes."""
        tangents, guidance = sizes
        sample = torch.arange(self.batch)
        rows = torch.arange(guidance) % self.batch
        return Plan(
            tangent=sample[self.batch - tangents :],
            order=None if self.config.equal_placement == "first" else sample,
            guided=torch.full((self.batch,), guidance > 0),
            rows=rows,
            null=rows >= 0,
            null_row=sample % max(guidance, 1),
            cond_row=torch.where(sample < self.batch - tangents, -1, 0),
        )

    def dynamic(self, plan: Plan) -> list[Tensor]:
        """One compiled graph serves all sizes of a group except 0 and the whole batch."""
        groups = [plan.rows, plan.null] if len(plan.rows) else []
        if plan.order is not None and 0 < plan.tangent_start < len(plan.guided):
            groups.append(plan.tangent)
        return groups


def whole_batch(
    config: ObjectiveConfig, r: Tensor, t: Tensor, drop: Tensor, inputs: GuidanceInputs | None = None
) -> Plan:
    """The official step: each pass on every sample."""
    sample = torch.arange(len(t), device=t.device)
    conditional = config.mixes_conditional or config.predicts_direction
    passes, nulls = config.guided + conditional, len(t) if config.guided else 0
    return Plan(
        # clone: Dynamo would specialise on the same tensor being passed twice
        tangent=sample.clone(),
        order=None,
        guided=guided_mask(config, t, drop, inputs),
        rows=sample.repeat(passes),
        null=torch.arange(passes * len(t), device=t.device) < nulls,
        null_row=sample,
        cond_row=sample + nulls if conditional else torch.full_like(sample, -1),
    )


class Predictions(NamedTuple):
    """The network's own predictions of the velocity, at r = t, for those who need them before the derivative."""

    config: ObjectiveConfig
    plan: Plan
    kappa: Tensor | float
    """Of v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_null, a number or (B,)."""
    rows: Tensor
    """(G, ...), a row for each row of the plan."""

    @classmethod
    def make(cls, config, passes: Passes, z: Tensor, t: Tensor, y: Tensor, inputs: GuidanceInputs | None, plan: Plan):
        """One forward of all rows; none at all without rows."""
        kappa, told, rows, null = config.kappa, None, plan.rows, plan.null
        if inputs is not None:
            omega = guided_scale(config, t, inputs)
            kappa = 1 - 1 / omega
            # guidance acts always in a prediction, with the scale 1 where it did not
            always = torch.zeros_like(t[rows]), torch.ones_like(t[rows])
            told = GuidanceInputs(torch.where(null, 1, omega[rows]), *always)
        if not len(rows):
            return cls(config, plan, kappa, z[:0])
        t, y = t[rows], torch.where(null, passes.null_label, y[rows])
        return cls(config, plan, kappa, passes("guidance", z[rows], t, t, y, *told_to(config, told)))

    def conditional(self, samples: slice, primal: Tensor | None = None) -> Tensor:
        """v_c of some samples. primal: of the same pass, where the plan takes that for a prediction."""
        cond_row = self.plan.cond_row[samples]
        v_c = self.rows[cond_row.clamp(min=0)]
        return v_c if primal is None else torch.where(column(cond_row < 0, v_c), primal, v_c)

    def guided(self, v: Tensor, samples: slice, primal: Tensor | None = None) -> Tensor:
        """v_g of some samples, from the velocity v of all."""
        plan, v, omega = self.plan, v[samples], self.config.omega
        if not (self.config.guided and len(self.rows)):
            return v
        kappa = column(self.kappa[samples], v) if isinstance(self.kappa, Tensor) else self.kappa
        v_g = omega * v + (1 - omega - kappa) * self.rows[plan.null_row[samples]]
        if self.config.mixes_conditional:
            v_g = v_g + kappa * self.conditional(samples, primal)
        return torch.where(column(plan.guided[samples], v), v_g, v)


def guided_scale(config: ObjectiveConfig, t: Tensor, inputs: GuidanceInputs) -> Tensor:
    """omega' (B,): omega within the drawn interval, both ends included, else 1."""
    if config.guidance_input != "interval":
        return inputs.omega
    return torch.where((inputs.start <= t) & (t <= inputs.end), inputs.omega, 1)
