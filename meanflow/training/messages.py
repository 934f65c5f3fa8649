"""Inputs and results of a training step, and its failures in words."""

import sys
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..data.dataset import Batch
from ..errors import UserError
from ..method.contract import Plan, Sizes, Terms

MEMORY = (
    "memory: the step does not fit ({}), wanted a smaller one; lower --train.batch, take --train.precision bf16, or "
    "--train.checkpoint-blocks, which computes blocks twice and keeps less"
)
COMPILE = (
    "train.compile: got True, but the step could not be compiled ({}), wanted a working compiler (on the CPU a C++ "
    "one, g++ or clang++); take --train.no-compile, which computes the same more slowly"
)


class StepInputs(NamedTuple):
    """All that a step depends on except the weights: tensors on its device."""

    batch: Batch
    samples: Tensor
    """Each sample's index in the global batch (B,) int64, which decides its draws."""
    step: Tensor
    """Index of the step () int64."""
    drawn: Any
    """What the objective has drawn beside data and noise, a NamedTuple with a row a sample."""
    plan: Plan
    needed: Sizes = ()
    """The plan's sizes without padding, for counting; the step does not read them."""

    def to(self, device: torch.device) -> "StepInputs":
        """Copy to a device; the host does not wait for a GPU."""

        def move(x):
            if not isinstance(x, Tensor) or x.device == device:
                return x
            pinned = x.pin_memory() if device.type == "cuda" and not x.is_pinned() else x
            return pinned.to(device, non_blocking=True)

        return pytree.tree_map(move, self)


class StepResult(NamedTuple):
    """Results of a step. With CUDA graphs the next step overwrites them."""

    terms: tuple[Terms, ...]
    """Those of each micro-batch of this process."""
    grad_norm: Tensor
    """Norm of the whole gradient ()."""
    skipped: Tensor
    """1.0 if the guard skipped the step, else 0.0, () fp32."""


@contextmanager
def explained_failures():
    """Raise failures that a setting can help as one line that names it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(MEMORY.format(_first_line(error))) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            raise UserError(MEMORY.format(_first_line(error))) from None
        if _is_compiler(error):
            raise UserError(COMPILE.format(_first_line(error))) from error
        raise


def _is_compiler(error: RuntimeError) -> bool:
    exceptions = sys.modules.get("torch._dynamo.exc")
    return exceptions is not None and isinstance(error, exceptions.TorchDynamoException)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
