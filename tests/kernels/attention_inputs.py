"""Inputs of the attention tests, and what is exact."""

import torch
from torch import Tensor

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


def _in_order(a: Tensor, b: Tensor) -> Tensor:
    """a (.., M, K) @ b (.., K, N), the K products added one after the other, as tl.dot adds them in fp32 on a GPU."""
    total = torch.zeros((), dtype=a.dtype, device=a.device)
    for i in range(a.shape[-1]):
        total = torch.addcmul(total, a[..., i : i + 1], b[..., i : i + 1, :])
    return total


def scores_in_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention whose scores are running sums: beside a product of -576 each addition leaves 3e-5."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((_in_order(q, k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def plain_jvps(primals, tangents):
    """(o, o_dot) by plain torch: as a user writes it, and in fp32 also by the kernel's formula, its sums in order.

    cuBLAS cuts a sum of a few hundred products into parts, whose error is two to three times smaller than that of one
    running sum; and the formula takes o l_dot from a sum of the same size, where jvp forms p (s_dot - mean) first. Both
    show in the largest error of an element where v is far from 0.
    """
    found = [torch.func.jvp(plain_attention, primals, tangents)]
    if primals[0].dtype == torch.float32:
        (q, k, v), (q_dot, k_dot, v_dot) = (tuple(x.transpose(1, 2) for x in xs) for xs in (primals, tangents))
        scale = q.shape[-1] ** -0.5
        s = _in_order(q, k.mT) * scale
        s_dot = _in_order(torch.cat([q_dot, q], -1), torch.cat([k, k_dot], -1).mT) * scale
        p = (s - s.amax(-1, keepdim=True)).exp()
        ps_dot = p * s_dot
        l, l_dot = (x.sum(-1, keepdim=True) for x in (p, ps_dot))
        o = _in_order(p, v) / l
        o_dot = (_in_order(torch.cat([p, ps_dot], -1), torch.cat([v_dot, v], -2)) - o * l_dot) / l
        found.append(tuple(x.transpose(1, 2) for x in (o, o_dot)))
    return tuple(zip(*found, strict=True))
