"""The split of a step's global batch over the processes and their micro-batches.

The official code decides on a device's whole batch which samples get r = t and which labels are dropped: the first
ones. Here the global batch is cut into groups, one per device or any other number; a group's first samples are chosen,
and each group is spread so that every micro-batch keeps its share. The draws are functions of a sample's place in the
global batch: the numbers depend on the groups, not on how many processes there are.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..config import ObjectiveConfig
from ..draws import Draws, Purpose
from ..errors import require
from .times import draw_times, drop_mask, equal_prefix


class BatchSplit:
    """The global batch of a step, in groups, split into micro-batches of one size.

    Args:
        batch: samples of a step. groups: equal groups, in each of which the first samples are chosen.
        micro_batches: of a step, in all processes together.

    Raises:
        UserError: if the batch does not divide.
    """

    def __init__(self, batch: int, groups: int, micro_batches: int):
        wanted = f"a multiple of {micro_batches} (processes x train.accumulate), at least twice that"
        hint = f"take {max(2, -(-batch // micro_batches)) * micro_batches}"
        require(batch % micro_batches == 0 and batch >= 2 * micro_batches, "train.batch", batch, wanted, hint)
        require(batch % groups == 0, "train.groups", groups, f"a divisor of the batch {batch}", "0 takes one a process")
        self.batch, self.groups, self.micro_batches = batch, groups, micro_batches
        self.group_size, self.micro_batch_size = batch // groups, batch // micro_batches
        # micro-batches share groups
        self._group = lru_cache(groups)(self._draw_group)

    def samples(self, micro_batch: int) -> Tensor:
        """Indices in the global batch of a micro-batch's samples (size,) int64; each group's first ones come first."""
        # order the samples place by place (sample 0 of every group, then sample 1, ...); a micro-batch takes every
        # micro_batches-th of them
        ordered = torch.arange(micro_batch, self.batch, self.micro_batches)
        return ordered % self.groups * self.group_size + ordered // self.groups

    def prefix(self, config: ObjectiveConfig, micro_batch: int) -> int:
        """How many samples at the start of a micro-batch have r = t, whatever is drawn."""
        chosen = equal_prefix(config, self.group_size) * self.groups
        return len(range(micro_batch, chosen, self.micro_batches))

    def draw(self, config: ObjectiveConfig, seed: int, step: int, micro_batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a micro-batch's times r, t and its dropped labels (bool), each (size,)."""
        samples = self.samples(micro_batch)
        r, t, drop = torch.zeros(self.batch), torch.zeros(self.batch), torch.zeros(self.batch, dtype=torch.bool)
        for group in (samples // self.group_size).unique().tolist():
            members = slice(group * self.group_size, (group + 1) * self.group_size)
            r[members], t[members], drop[members] = self._group(config, seed, step, group)
        return r[samples], t[samples], drop[samples]

    def _draw_group(self, config: ObjectiveConfig, seed: int, step: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
        draws = Draws(seed, step, torch.arange(group * self.group_size, (group + 1) * self.group_size))
        return *draw_times(config, draws), drop_mask(config, draws.uniform(Purpose.LABEL_DROP))
