"""Inputs of the attention tests, and what is exact."""

import torch

from benchmarks.workloads.plain import attention as plain_attention

HARD = ("sharp", "shifted v", "shared direction")
"""q and k of standard deviation 3; v of mean 4; q_dot and k_dot that share one direction over the tokens."""


def make_inputs(kind: str, batch: int, m: int, n: int, heads: int, head_dim: int, dtype: torch.dtype, device: str):
    """(q, k, v) and (q_dot, k_dot, v_dot), rounded to dtype; self-attention is packed as (B, L, 3, H, D)."""

    def three(spread=1.0):
        if m == n:
            return tuple((spread * torch.randn(batch, n, 3, heads, head_dim)).unbind(2))
        return tuple(spread * torch.randn(batch, length, heads, head_dim) for length in (m, n, n))

    primals, tangents = three(3.0 if kind == "sharp" else 1.0), three()
    if kind == "shifted v":
        primals[2].add_(4.0)
    if kind == "shared direction":
        direction = torch.randn(head_dim)
        tangents[0].add_(direction)
        tangents[1].add_(direction)
    # .to keeps the strides of the packed projection
    return tuple(x.to(device, dtype) for x in primals), tuple(x.to(device, dtype) for x in tangents)


def exact_jvp(primals, tangents):
    """o and o_dot in fp64 from the same rounded inputs."""
    return torch.func.jvp(plain_attention, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
