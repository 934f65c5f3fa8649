"""Linear layer on (primal, tangent) pairs: bias on the primal only, and only the primal is differentiated."""

import torch
from torch import Tensor

from ..dual import absent


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (C, K), bias (C,) -> x weight^T + bias, (..., C)."""
    return torch.nn.functional.linear(x, weight, bias)


def linear_jvp(primals, tangents, weight: Tensor, bias: Tensor | None = None):
    """linear and its tangent: (x,), (x_dot,) -> y, y_dot = x_dot weight^T. Weight and bias have no tangent."""
    y = linear(*primals, weight, bias)
    if absent(tangents):
        return y, None
    with torch.no_grad():
        return y, torch.nn.functional.linear(tangents[0], weight)
