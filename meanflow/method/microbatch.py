"""The split of a step's global batch over the processes and their micro-batches.

The official code decides on a device's whole batch which samples get r = t and which labels are dropped: the first
ones. Here the global batch is cut into groups, one per device or any other number; a group's first samples are chosen,
and each group is spread so that every micro-batch keeps its share. The draws are functions of a sample's place in the
global batch: the numbers depend on the groups, not on how many processes there are. Sets of samples that belong
together are spread as one sample is.
"""

import torch
from torch import Tensor

from ..errors import require


class BatchSplit:
    """The global batch of a step, in groups, split into micro-batches of one size.

    Args:
        batch: samples of a step. groups: equal groups, in each of which the first samples are chosen.
        micro_batches: of a step, in all processes together.
        set_size: samples that stay together.

    Raises:
        UserError: if the batch does not divide.
    """

    def __init__(self, batch: int, groups: int = 1, micro_batches: int = 1, set_size: int = 1):
        least = max(2, set_size)
        whole = micro_batches * set_size
        sets = f" x the {set_size} samples of a set" if set_size > 1 else ""
        wanted = f"a multiple of {whole} (processes x train.accumulate{sets}), at least {least * micro_batches}"
        hint = f"take {max(-(-least // set_size), -(-batch // whole)) * whole}"
        require(batch % whole == 0 and batch >= least * micro_batches, "train.batch", batch, wanted, hint)
        fits, wanted = batch % (groups * set_size) == 0, f"a divisor of the batch {batch}"
        wanted += f" / {set_size}" if set_size > 1 else ""
        require(fits, "train.groups", groups, wanted, "0 takes one a process")
        self.batch, self.groups, self.micro_batches, self.set_size = batch, groups, micro_batches, set_size
        self.group_size, self.micro_batch_size = batch // groups, batch // micro_batches

    def samples(self, micro_batch: int) -> Tensor:
        """Indices in the global batch of a micro-batch's samples (size,) int64; each group's first ones come first."""
        # order the sets place by place (set 0 of every group, then set 1, ...); a micro-batch takes every
        # micro_batches-th of them
        ordered = torch.arange(micro_batch, self.batch // self.set_size, self.micro_batches)
        sets = ordered % self.groups * (self.group_size // self.set_size) + ordered // self.groups
        return (sets[:, None] * self.set_size + torch.arange(self.set_size)).flatten()

    def prefix(self, first: int, micro_batch: int) -> int:
        """How many samples at the start of a micro-batch are among the first so many of their group (whole sets)."""
        chosen = first // self.set_size * self.groups
        return len(range(micro_batch, chosen, self.micro_batches)) * self.set_size
