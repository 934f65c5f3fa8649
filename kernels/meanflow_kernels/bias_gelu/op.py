"""Bias + tanh-GELU on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import bias_gelu_ref, bias_gelu_tangent_ref


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """x (B, ..., C), bias (C,) -> gelu_tanh(x + bias) in x's dtype."""
    return bias_gelu_ref(x, bias).to(x.dtype)


def bias_gelu_jvp(primals, tangents, bias: Tensor, *, tangent_start: int | None = None):
    """bias_gelu and its tangent: (x,), (x_dot,) -> y, y_dot. The bias has no tangent."""
    y = bias_gelu(*primals, bias)
    if absent(tangents):
        return y, None
    with torch.no_grad():
        (x,) = tangent_rows(primals, tangents, tangent_start)
        return y, bias_gelu_tangent_ref(x, bias, tangents[0]).to(y.dtype)
