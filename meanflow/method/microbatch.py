"""How a step's global batch is dealt to the processes and their micro-batches.

The official code decides on a device's whole batch which samples get r = t and which labels are dropped: the first
ones. Here the global batch is cut into groups, one a device or any other number; a group's first samples are chosen,
and each group is dealt out so that every micro-batch keeps its share. The draws are functions of a sample's place in
the global batch: the numbers depend on the groups, not on how many processes there are.
"""

import torch
from torch import Tensor

from ..config import ObjectiveConfig
from ..draws import Draws, Purpose
from ..errors import require
from .times import draw_times, drop_mask, equal_prefix


class Deal:
    """A global batch of so many samples, in groups, dealt to parts of one size.

    Args:
        batch: samples of a step. groups: equal parts of it within which samples are chosen.
        parts: micro-batches of a step, of all processes.

    Raises:
        UserError: where the batch does not divide.
    """

    def __init__(self, batch: int, groups: int, parts: int):
        require(
            batch % parts == 0 and batch >= 2 * parts,
            "train.batch", batch, f"a multiple of {parts} (processes x train.accumulate), at least twice that",
            f"take {max(2, -(-batch // parts)) * parts}",
        )  # fmt: skip
        require(
            batch % groups == 0, "train.groups", groups, f"a divisor of the batch {batch}",
            "0 takes one a process",
        )  # fmt: skip
        self.batch, self.groups, self.parts = batch, groups, parts
        self.group_size, self.part_size = batch // groups, batch // parts

    def samples(self, part: int) -> Tensor:
        """Places in the global batch of a part's samples (batch / parts,) int64; each group's first ones come first."""
        # dealt like cards from groups that lie side by side: by place in the group, then by group
        dealt = torch.arange(part, self.batch, self.parts)
        return dealt % self.groups * self.group_size + dealt // self.groups

    def prefix(self, config: ObjectiveConfig, part: int) -> int:
        """How many samples at the start of a part are known to have r = t, whatever is drawn."""
        chosen = equal_prefix(config, self.group_size) * self.groups
        return len(range(part, chosen, self.parts))

    def draw(self, config: ObjectiveConfig, seed: int, step: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """The times r and t and who trains on the null class, each (batch / parts,), of a part's samples."""
        samples = self.samples(part)
        r, t, drop = torch.zeros(self.batch), torch.zeros(self.batch), torch.zeros(self.batch, dtype=torch.bool)
        for group in (samples // self.group_size).unique().tolist():
            mine = torch.arange(group * self.group_size, (group + 1) * self.group_size)
            draws = Draws(seed, step, mine)
            r[mine], t[mine] = draw_times(config, draws)
            drop[mine] = drop_mask(config, draws.uniform(Purpose.LABEL_DROP))
        return r[samples], t[samples], drop[samples]
