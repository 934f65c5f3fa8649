"""The operators as an ordinary torch user writes them: what kernels are timed against, what the tests take for plain
torch's error, and in fp64 what is exact.
"""

import math

import torch
from torch import Tensor


def adaln(x: Tensor, shift: Tensor, scale: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift."""
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return (y * (1 + scale[:, None]) + shift[:, None]).to(out_dtype or x.dtype)


def gate_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum x + gate (y + bias), and adaln of it."""
    y = y if bias is None else y + bias.to(y.dtype)
    x = x + (gate[:, None] * y).to(x.dtype)
    return x, adaln(x, shift, scale, out_dtype=out_dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x + bias)."""
    return torch.nn.functional.gelu(x + bias.to(x.dtype), approximate="tanh")


def rmsnorm(x: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """weight x / sqrt(mean(x^2) + 1e-6)."""
    y = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.to(x.dtype)
    return y.to(out_dtype or x.dtype)


def gate_rmsnorm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The sum x + gate y, and rmsnorm of it."""
    x = x + (gate * y).to(x.dtype)
    return x, rmsnorm(x, weight, out_dtype=out_dtype)


def qk_rope(qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, each after its norm, rotated as complex numbers."""

    def one(x: Tensor, weight: Tensor) -> Tensor:
        pairs = rmsnorm(x, weight).to(cos.dtype).unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, None]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    q, k = qk.unbind(2)
    return one(q, q_weight), one(k, k_weight)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) b of x = a | b."""
    a, b = x.chunk(2, -1)
    return torch.nn.functional.silu(a) * b


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Math attention, (B, N, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    p = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    return (p @ v).transpose(1, 2)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """DiT's lines; 16-bit times in fp32."""
    half = dim // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angles = t[:, None].to(dtype) * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(features, (0, dim % 2)).to(t.dtype)
