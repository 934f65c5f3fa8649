"""Second stage of the deterministic reductions: each program of a backward kernel leaves an fp32 sum, added up here."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .tiling import TileConfig, ceil_div, next_power_of_two

_NARROWEST = 8
"""Columns of a strip at least: one sector of 32 bytes."""


@triton.jit
def _sum_rows(partial_ptr, cols, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of P rows in BLOCK_C columns."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (cols < C)[None, :]
        total += tl.load(partial_ptr + p[:, None] * C + cols[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,  # (sums, samples, P, C), fp32
    sum0_ptr,  # (samples, C)
    sum1_ptr,  # (samples, C), or None where there is one sum
    sum2_ptr,  # (samples, C), or None where there are two sums
    whole_ptr,  # (C,): the last sum, of all samples; or None
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_P: tl.constexpr,
    WHOLE_C: tl.constexpr,
):
    sample, column_block, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    samples = tl.num_programs(0)
    if whole_ptr is not None:
        if which == tl.num_programs(2) - 1:
            # the samples' programs share the columns: narrow strips, so that no program's sum takes long
            cols = (column_block * samples + sample) * WHOLE_C + tl.arange(0, WHOLE_C)
            partial_ptr += (which * samples).to(tl.int64) * P * C
            total = _sum_rows(partial_ptr, cols, samples * P, C, WHOLE_P, WHOLE_C)
            tl.store(whole_ptr + cols, total.to(whole_ptr.dtype.element_ty), mask=cols < C)
            return
    cols = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = cols < C
    partial_ptr += (which * samples + sample).to(tl.int64) * P * C
    total = _sum_rows(partial_ptr, cols, P, C, BLOCK_P, BLOCK_C)
    out = sample * C + cols
    if which == 0:
        tl.store(sum0_ptr + out, total.to(sum0_ptr.dtype.element_ty), mask=inside)
    if sum1_ptr is not None:
        if which == 1:
            tl.store(sum1_ptr + out, total.to(sum1_ptr.dtype.element_ty), mask=inside)
    if sum2_ptr is not None:
        if which == 2:
            tl.store(sum2_ptr + out, total.to(sum2_ptr.dtype.element_ty), mask=inside)


def sum_partials(partial: Tensor, sums: list[Tensor], config: TileConfig, whole: Tensor | None = None) -> Launch:
    """partial (sums, samples x P, C) in fp32 -> one to three tensors (samples, C), each rounded once to its dtype.

    With ``whole`` (C,) partial has one more sum, which is of all samples. The order of summation depends on the shapes
    and the GPU alone, so two runs agree to the last bit.
    """
    samples, width = sums[0].shape
    programs = partial.shape[1] // samples
    # no lane reads where there is nothing
    block_p = min(config.block_r, next_power_of_two(programs))
    whole_c = max(_NARROWEST, next_power_of_two(ceil_div(config.block_c, samples)))
    whole_p = min(config.block_r * config.block_c // whole_c, next_power_of_two(partial.shape[1]))
    return Launch(
        kernel=_sum_partials_kernel,
        grid=(samples, ceil_div(width, config.block_c), len(partial)),
        args={f"sum{i}_ptr": sums[i] if i < len(sums) else None for i in range(3)}
        | {"partial_ptr": partial, "whole_ptr": whole, "P": programs},
        constexprs={"C": width, "BLOCK_P": block_p, "BLOCK_C": config.block_c}
        | ({"WHOLE_P": 1, "WHOLE_C": 1} if whole is None else {"WHOLE_P": whole_p, "WHOLE_C": whole_c}),
        num_warps=config.num_warps,
        num_stages=1,
    )
