"""Second stage of the deterministic reductions: each program of a backward kernel leaves an fp32 sum, added up here."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .tiling import TileConfig, ceil_div, next_power_of_two


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # (sums, samples, P, C), fp32
    sum0_ptr,  # (samples, C)
    sum1_ptr,  # (samples, C), or None where there is one sum
    sum2_ptr,  # (samples, C), or None where there are two sums
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, column_block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    partial_ptr += (which * tl.num_programs(0) + sample).to(tl.int64) * P * C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & inside[None, :]
        total += tl.load(partial_ptr + p[:, None] * C + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    out = sample * C + cols
    if which == 0:
        tl.store(sum0_ptr + out, total.to(sum0_ptr.dtype.element_ty), mask=inside)
    if sum1_ptr is not None:
        if which == 1:
            tl.store(sum1_ptr + out, total.to(sum1_ptr.dtype.element_ty), mask=inside)
    if sum2_ptr is not None:
        if which == 2:
            tl.store(sum2_ptr + out, total.to(sum2_ptr.dtype.element_ty), mask=inside)


def sum_partials(partial: Tensor, sums: list[Tensor], config: TileConfig) -> Launch:
    """partial (sums, samples x P, C) in fp32 -> one to three tensors (samples, C), each rounded once to its dtype.

    The order of summation depends on the shapes and the GPU alone, so two runs agree to the last bit.
    """
    samples, width = sums[0].shape
    programs = partial.shape[1] // samples
    # no lane reads where there is nothing
    block_p = min(config.block_r, next_power_of_two(programs))
    return Launch(
        kernel=_sum_partials_kernel,
        grid=(samples, ceil_div(width, config.block_c), len(sums)),
        args={f"sum{i}_ptr": sums[i] if i < len(sums) else None for i in range(3)}
        | {"partial_ptr": partial, "P": programs},
        constexprs={"C": width, "BLOCK_P": block_p, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        num_stages=1,
    )
