"""What goes into a training step, and what comes out of it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..data.dataset import Batch
from ..method.plan import Plan
from ..method.terms import Terms


class StepInputs(NamedTuple):
    """All that a step depends on, but the weights: tensors on its device."""

    batch: Batch
    samples: Tensor
    """(B,) int64, each sample's index in the global batch: what its draws are a function of."""
    step: Tensor
    """() int64."""
    r: Tensor
    t: Tensor
    drop: Tensor
    plan: Plan

    def to(self, device: torch.device) -> "StepInputs":
        """On a device; the host does not wait for a GPU."""

        def move(x):
            if not isinstance(x, Tensor) or x.device == device:
                return x
            pinned = x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x
            return pinned.to(device, non_blocking=True)

        return pytree.tree_map(move, self)


class StepResult(NamedTuple):
    """Results of a step. With CUDA graphs the next step overwrites them."""

    terms: tuple[Terms, ...]
    """Of each micro-batch of this process."""
    grad_norm: Tensor
    """() of the whole gradient."""
    skipped: Tensor
    """() fp32, 1 where the guard kept the step from being made."""
