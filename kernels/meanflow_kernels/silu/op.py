"""SiLU on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import silu_ref, silu_tangent_ref


def silu(x: Tensor) -> Tensor:
    """x (B, ...) -> x sigmoid(x) in x's dtype."""
    return silu_ref(x).to(x.dtype)


def silu_jvp(primals, tangents, *, tangent_start: int | None = None):
    """silu and its tangent: (x,), (x_dot,) -> y, y_dot."""
    y = silu(*primals)
    if absent(tangents):
        return y, None
    with torch.no_grad():
        (x,) = tangent_rows(primals, tangents, tangent_start)
        return y, silu_tangent_ref(x, tangents[0]).to(y.dtype)
