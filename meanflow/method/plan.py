"""Plans of a step: which samples of a batch need which pass of the network.

The official step runs every pass on every sample. Much of that is multiplied by zero or computed twice: where r = t
the factor of the derivative is zero and u(z, t, t | y) is the primal pass itself; without a label, or outside the
guidance interval, no guidance is used. A plan says what is left. It is made on the host from the times and dropped
labels, before the device is asked for anything.

A group's size decides the shapes of a step, so groups are padded to a few declared sizes: whoever compiles or captures
the step knows all of them beforehand. Processes that replay one captured step together take the same sizes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ObjectiveConfig
from ..errors import require
from .guidance import GuidanceInputs
from .times import equal_prefix

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

    def to(self, device: torch.device) -> "Plan":
        """Copy to another device without waiting."""
        return Plan(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))


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
    """What a plan is made from, on the CPU."""

    r: Tensor
    t: Tensor
    """Times (B,)."""
    drop: Tensor
    """Who trains on the null class (B,) bool."""
    guidance: GuidanceInputs | None = None
    """Of the network that is told of its guidance."""


class Planner:
    """Makes the plans of one device's batches.

    Args:
        config: of the objective.
        batch: samples B, of a device or of a micro-batch.
        prefixes: how many samples at the start of a batch may be known to have r = t; None is the official number.
    """

    def __init__(self, config: ObjectiveConfig, batch: int, prefixes: Iterable[int] | None = None):
        self.config, self.batch = config, batch
        self._prefixes = {equal_prefix(config, batch)} if prefixes is None else set(prefixes)
        # torch specialises a compiled region on a dimension of one
        self.granule = max(2, -(-batch // (SIZES_WITH_PREDICTIONS if config.predicts_direction else SIZES_PER_BATCH)))
        self.tangent_sizes = self._tangent_sizes()
        self.guidance_sizes = self._guidance_sizes()

    def _multiples(self, most: int) -> tuple[int, ...]:
        return (*range(0, most, self.granule), most)

    def _tangent_sizes(self) -> tuple[int, ...]:
        if self.config.equal_placement == "first":
            return tuple(sorted(self.batch - prefix for prefix in self._prefixes))
        return self._multiples(self.batch)

    def _guidance_sizes(self) -> tuple[int, ...]:
        config, derived = self.config, self.tangent_sizes[-1]
        conditional = derived if config.predicts_direction else 0
        if config.mixes_conditional:
            conditional = self.batch if config.guide_dropped or not self._primal_serves else derived
        most = (self.batch if config.guided else 0) + conditional
        if not most:
            return (0,)
        always = (config.guidance_start, config.guidance_end) == (0, 1) and config.guidance_input != "interval"
        if (not config.guided or (always and config.label_drop == 0)) and len(self.tangent_sizes) == 1:
            return (most,)
        # size 0 is left out: one shape fewer to compile, and under FSDP all ranks must run the same number of forwards
        return self._multiples(most)[1:]

    @property
    def _primal_serves(self) -> bool:
        """Whether the primal pass, where r = t, is the conditional prediction: only if the current weights guide."""
        return self.config.guidance_weights == "current"

    def plan(self, r: Tensor, t: Tensor, drop: Tensor, inputs: GuidanceInputs | None = None) -> Plan:
        """Plan the passes of a batch.

        Args:
            r, t: times (B,), on the CPU. drop: (B,) bool, who trains on the null class. inputs: of the network that is
                told of its guidance.

        Raises:
            UserError: for another batch size, or r < t where the configuration promises r = t.
        """
        return self.plan_together(Drawn(r, t, drop, inputs), ())

    def plan_together(self, mine: Drawn, others: Iterable[Drawn]) -> Plan:
        """Plan the passes of a batch with the largest sizes that it or another process's batch needs.

        Raises:
            UserError: as plan, for any of the batches.
        """
        drawn = (mine, *others)
        tangent_start = min(map(self._tangent_start, drawn))
        # the derivative's size first: it decides who needs a conditional prediction
        masks = [self._masks(each, tangent_start) for each in drawn]
        rows = max(int(guided.sum() + conditional.sum()) for guided, conditional, _ in masks)
        return self._fill(*masks[0], tangent_start, _padded(rows, self.guidance_sizes))

    def _tangent_start(self, drawn: Drawn) -> int:
        unequal, count = drawn.r != drawn.t, len(drawn.t)
        require(count == self.batch, "batch", count, f"the plan's {self.batch}", "make a Planner for each size")
        if self.config.equal_placement == "bernoulli":
            return self.batch - _padded(int(unequal.sum()), self.tangent_sizes)
        known = [prefix for prefix in self._prefixes if not unequal[:prefix].any()]
        wanted = f"r = t in the first {min(self._prefixes)} samples"
        require(len(known) > 0, "r", "r < t", wanted, "set objective.equal_placement to bernoulli")
        return max(known)

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

    def _fill(self, guided: Tensor, conditional: Tensor, order: Tensor | None, tangent_start: int, size: int) -> Plan:
        """The plan with so many rows of the guidance forward."""
        sample = torch.arange(self.batch)
        null = sample[guided]
        rows = torch.cat([null, sample[conditional]])
        padding = size - len(rows)
        null_row, cond_row = torch.zeros_like(sample), torch.full_like(sample, -1)
        null_row[null] = torch.arange(len(null))
        cond_row[conditional] = torch.arange(len(null), len(rows))
        return Plan(
            tangent=sample[tangent_start:],
            order=order,
            guided=guided,
            rows=torch.cat([rows, rows.new_zeros(padding)]),
            null=torch.arange(len(rows) + padding) < len(null),
            null_row=null_row,
            cond_row=cond_row,
        )

    def example(self, guidance_size: int, tangent_size: int | None = None) -> Plan:
        """A plan of given sizes, to compile or count a step with; its indices are arbitrary."""
        tangent_start = self.batch - (self.tangent_sizes[-1] if tangent_size is None else tangent_size)
        sample = torch.arange(self.batch)
        rows = torch.arange(guidance_size) % self.batch
        return Plan(
            tangent=sample[tangent_start:],
            order=None if self.config.equal_placement == "first" else sample,
            guided=torch.full((self.batch,), guidance_size > 0),
            rows=rows,
            null=rows >= 0,
            null_row=sample % max(guidance_size, 1),
            cond_row=torch.where(sample < tangent_start, -1, 0),
        )


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


def _padded(count: int, sizes: tuple[int, ...]) -> int:
    return next(size for size in sizes if size >= count)
