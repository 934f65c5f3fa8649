"""The one rule for the precision of references: 16-bit inputs are computed in fp32, fp32 and fp64 in themselves."""

import torch
from torch import Tensor


def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each 16-bit tensor in fp32; fp32, fp64 and absent ones unchanged."""
    return tuple(x if x is None or x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors)
