"""RMSNorm with a learned weight, its forward-mode derivative and its backward; rows/kernel.py has what a row is."""

import triton
import triton.language as tl

from ..rows.kernel import (
    add_rows,
    load_row,
    mul_rows,
    rms_normalise,
    rms_normalise_along,
    row_at,
    rows_of_program,
    store_partial,
    store_row,
    zero_row,
)


@triton.jit
def _rmsnorm_rows(
    x_ptr,  # (L, C), of one sample as the rest
    weight_ptr,  # (C,), of all
    y_ptr,  # (L, C)
    x_dot_ptr,  # (L, C); None in a sample without a tangent
    y_dot_ptr,  # (L, C); None in a sample without a tangent
    stride_x_l,
    stride_x_dot_l,
    first,
    end,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    for l in tl.range(first, end, num_stages=STAGES):
        # x_hat = rstd x, x_hat_dot = rstd (x_dot - x_hat mean(x_hat x_dot))
        x, weight = load_row(row_at(x_ptr, l * stride_x_l, ALIGN), C, TILE), load_row(weight_ptr, C, TILE)
        if y_dot_ptr is None:
            x_hat = rms_normalise(x, eps, C)
        else:
            # before the first exchange between threads, so that both rows are on their way at once
            x_dot = load_row(row_at(x_dot_ptr, l * stride_x_dot_l, ALIGN), C, TILE)
            x_hat, x_hat_dot = rms_normalise_along(x, x_dot, eps, C)
        # y = weight x_hat, y_dot = weight x_hat_dot
        store_row(row_at(y_ptr, l, C), mul_rows(weight, x_hat), C)
        if y_dot_ptr is not None:
            store_row(row_at(y_dot_ptr, l, C), mul_rows(weight, x_hat_dot), C)


@triton.jit
def _rmsnorm_kernel(
    x_ptr,  # (B, L, C)
    weight_ptr,  # (C,)
    y_ptr,  # (B, L, C), contiguous
    x_dot_ptr,  # (n, L, C), of samples tangent_start to tangent_start + n; None where no tangent is asked for
    y_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    stride_x_b,
    stride_x_l,
    stride_x_dot_b,
    stride_x_dot_l,
    L,
    rows_per_program,
    tangent_start,
    tangent_samples,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    b_dot = b - tangent_start
    primal = (row_at(x_ptr, b * stride_x_b, ALIGN), weight_ptr, row_at(y_ptr, b * L, C))
    share = (stride_x_l, stride_x_dot_l, first, end)
    x_dot_ptr = row_at(x_dot_ptr, b_dot * stride_x_dot_b, ALIGN)
    y_dot_ptr = row_at(y_dot_ptr, b_dot * L, C)
    # a loop of its own for samples without a tangent: they pay nothing for those that have one
    if y_dot_ptr is not None and (b_dot >= 0) & (b_dot < tangent_samples):
        _rmsnorm_rows(*primal, x_dot_ptr, y_dot_ptr, *share, eps, C, TILE, ALIGN, STAGES)
    else:
        _rmsnorm_rows(*primal, None, None, *share, eps, C, TILE, ALIGN, STAGES)


@triton.jit
def _rmsnorm_bwd_kernel(
    x_ptr,  # (B, L, C)
    weight_ptr,  # (C,)
    dy_ptr,  # (B, L, C)
    dx_ptr,  # (B, L, C), contiguous
    partial_ptr,  # (1, programs, C), fp32: sums over a program's rows for dweight
    stride_x_b,
    stride_x_l,
    stride_dy_b,
    stride_dy_l,
    L,
    rows_per_program,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    # held in registers: the pipelined loop would fetch it anew for every row, past L1
    weight = load_row(weight_ptr, C, TILE)
    dweight = zero_row(C, TILE)
    for l in tl.range(first, end, num_stages=STAGES):
        x = load_row(row_at(x_ptr, b * stride_x_b + l * stride_x_l, ALIGN), C, TILE)
        dy = load_row(row_at(dy_ptr, b * stride_dy_b + l * stride_dy_l, ALIGN), C, TILE)
        # g = weight dy, dx = rstd (g - x_hat mean(x_hat g)), dweight = sum over rows of dy x_hat
        x_hat, dx = rms_normalise_along(x, mul_rows(weight, dy), eps, C)
        dweight = add_rows(dweight, mul_rows(dy, x_hat))
        store_row(row_at(dx_ptr, b * L + l, C), dx, C)
    store_partial(partial_ptr, 0, dweight, C)
