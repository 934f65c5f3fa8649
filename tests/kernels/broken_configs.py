"""Launch configs that each break one rule of the static report, and one that breaks none: printed as report rows."""

import json
import sys

import torch
import triton.language as tl
from triton import jit

from benchmarks import static_report
from meanflow_kernels.launch import CompileCase, Launch


@jit
def _scores_kernel(
    q_ptr, k_ptr, lse_ptr, t_ptr, o_ptr, n, stride, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """o = t q k^T + lse, summed over the blocks of k: a matrix product with row statistics and a scalar."""
    pid = tl.program_id(0)
    t = tl.load(t_ptr + pid)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    lse = tl.load(lse_ptr + offs_m)
    q = tl.load(q_ptr + offs_m[:, None] * stride + offs_d[None])
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + offs_n[:, None] * stride + offs_d[None], mask=offs_n[:, None] < n, other=0.0)
        acc += tl.dot(q, k.T)
    acc = acc * t + lse[:, None]
    tl.store(o_ptr + offs_m[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None], acc)


def _case(label, *, block_m=64, block_n=64, num_warps=4, num_stages=2, stride=1024, dtype=torch.bfloat16, head_dim=64):
    q, k, o = (torch.empty(4096, 1024, dtype=d, device="meta") for d in (dtype, dtype, torch.float32))
    lse, t = torch.empty(4096, device="meta"), torch.empty(64, dtype=torch.bfloat16, device="meta")
    args = dict(q_ptr=q, k_ptr=k, lse_ptr=lse, t_ptr=t, o_ptr=o, n=4096, stride=stride)
    constexprs = dict(D=head_dim, BLOCK_M=block_m, BLOCK_N=block_n)
    launch = Launch(_scores_kernel, (64,), args, constexprs, num_warps, num_stages)
    return CompileCase("attention", label, dtype, head_dim, launch)


CASES = [
    _case("sound"),
    _case("spills", block_m=128, block_n=256),
    _case("narrow", stride=1028),
    _case("much shared memory", head_dim=128, block_m=128, block_n=128, num_warps=8, num_stages=7),
    _case("no wgmma", block_m=32),
    _case("single precision", stride=1028, dtype=torch.float32),
    _case("does not compile", block_m=48),
]

if __name__ == "__main__":
    work = [("attention", int(arch), case) for arch in sys.argv[1:] for case in CASES]
    json.dump(static_report.report(work, jobs=2), sys.stdout)
