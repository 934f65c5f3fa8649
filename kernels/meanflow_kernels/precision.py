"""The one rule for the precision of references: 16-bit inputs are computed in fp32, fp32 and fp64 in themselves."""

from typing import Any, TypeVarTuple

import torch

Tensors = TypeVarTuple("Tensors")


def upcast(*tensors: *Tensors) -> tuple[*Tensors]:
    """Each 16-bit tensor in fp32; fp32, fp64 and absent ones unchanged."""
    wide = (torch.float32, torch.float64)
    upcasts: Any = tuple(x if x is None or x.dtype in wide else x.float() for x in tensors)
    return upcasts
