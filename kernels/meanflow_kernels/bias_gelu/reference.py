"""Bias + tanh-GELU and its forward-mode derivative, as mathematics."""

import math

import torch
from torch import Tensor

from ..precision import upcast

_K = math.sqrt(2 / math.pi)
_C = 0.044715


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """x (..., C), bias (C,) -> gelu_tanh(x + bias), not yet rounded."""
    x, bias = upcast(x, bias)
    return torch.nn.functional.gelu(x + bias, approximate="tanh")


def bias_gelu_tangent_ref(x: Tensor, bias: Tensor, x_dot: Tensor) -> Tensor:
    """Tangent of :func:`bias_gelu_ref`: gelu'(x + bias) x_dot."""
    x, bias, x_dot = upcast(x, bias, x_dot)
    x = x + bias
    x2 = x * x
    tanh = torch.tanh(_K * x * (1 + _C * x2))
    return (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * _K * (1 + 3 * _C * x2)) * x_dot
