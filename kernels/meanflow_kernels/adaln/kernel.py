"""LayerNorm + modulate, its forward-mode derivative and its backward; rows/kernel.py has what a row is."""

import triton
import triton.language as tl

from ..rows.kernel import (
    add_rows,
    load_factor,
    load_row,
    modulate,
    modulate_tangent,
    mul_rows,
    normalise,
    normalise_along,
    row_at,
    rows_of_program,
    store_partial,
    store_row,
    zero_row,
)


@triton.jit
def _adaln_rows(
    x_ptr,  # (L, C), of one sample as the rest
    shift_row,  # (C,)
    scale_row,  # (C,)
    y_ptr,  # (L, C)
    x_dot_ptr,  # (L, C) or None
    shift_dot_row,  # (C,) or None
    scale_dot_row,  # (C,) or None
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
        # x_hat = rstd (x - mean(x)), x_hat_dot = rstd (x_dot - mean(x_dot) - x_hat mean(x_hat x_dot))
        x = load_row(row_at(x_ptr, l * stride_x_l, ALIGN), C, TILE)
        if x_dot_ptr is None:
            x_hat, x_hat_dot = normalise(x, eps, C), None
        else:
            # before the first exchange between threads, so that both rows are on their way at once
            x_dot = load_row(row_at(x_dot_ptr, l * stride_x_dot_l, ALIGN), C, TILE)
            x_hat, x_hat_dot = normalise_along(x, x_dot, eps, C)
        # y = x_hat (1 + scale) + shift
        store_row(row_at(y_ptr, l, C), modulate(x_hat, shift_row, scale_row, C), C)
        # y_dot = x_hat_dot (1 + scale) + x_hat scale_dot + shift_dot
        if y_dot_ptr is not None:
            y_dot = modulate_tangent(x_hat, x_hat_dot, scale_row, shift_dot_row, scale_dot_row, C)
            store_row(row_at(y_dot_ptr, l, C), y_dot, C)


@triton.jit
def _adaln_kernel(
    x_ptr,  # (B, L, C)
    shift_ptr,  # (B, C)
    scale_ptr,  # (B, C)
    y_ptr,  # (B, L, C), contiguous
    x_dot_ptr,  # (n, L, C) or None; the tangents of samples tangent_start to tangent_start + n
    shift_dot_ptr,  # (n, C) or None
    scale_dot_ptr,  # (n, C) or None
    y_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    stride_x_b,
    stride_x_l,
    stride_shift_b,
    stride_scale_b,
    stride_x_dot_b,
    stride_x_dot_l,
    stride_shift_dot_b,
    stride_scale_dot_b,
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
    x_ptr = row_at(x_ptr, b * stride_x_b, ALIGN)
    shift_row = row_at(shift_ptr, b * stride_shift_b, ALIGN)
    scale_row = row_at(scale_ptr, b * stride_scale_b, ALIGN)
    y_ptr = row_at(y_ptr, b * L, C)
    x_dot_ptr = row_at(x_dot_ptr, b_dot * stride_x_dot_b, ALIGN)
    shift_dot_row = row_at(shift_dot_ptr, b_dot * stride_shift_dot_b, ALIGN)
    scale_dot_row = row_at(scale_dot_ptr, b_dot * stride_scale_dot_b, ALIGN)
    y_dot_ptr = row_at(y_dot_ptr, b_dot * L, C)
    primal, share = (x_ptr, shift_row, scale_row, y_ptr), (stride_x_l, stride_x_dot_l, first, end)
    # a loop of its own for samples without a tangent: they pay nothing for those that have one
    if y_dot_ptr is not None and (b_dot >= 0) & (b_dot < tangent_samples):
        _adaln_rows(*primal, x_dot_ptr, shift_dot_row, scale_dot_row, y_dot_ptr, *share, eps, C, TILE, ALIGN, STAGES)
    else:
        _adaln_rows(*primal, None, None, None, None, *share, eps, C, TILE, ALIGN, STAGES)


@triton.jit
def _adaln_bwd_kernel(
    x_ptr,  # (B, L, C)
    scale_ptr,  # (B, C)
    dy_ptr,  # (B, L, C)
    dx_ptr,  # (B, L, C), contiguous
    partial_ptr,  # (2, programs, C), fp32: sums over a program's rows for dshift, dscale
    stride_x_b,
    stride_x_l,
    stride_scale_b,
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
    factor = load_factor(row_at(scale_ptr, b * stride_scale_b, ALIGN), C, TILE)
    dshift, dscale = zero_row(C, TILE), zero_row(C, TILE)
    for l in tl.range(first, end, num_stages=STAGES):
        x = load_row(row_at(x_ptr, b * stride_x_b + l * stride_x_l, ALIGN), C, TILE)
        dy = load_row(row_at(dy_ptr, b * stride_dy_b + l * stride_dy_l, ALIGN), C, TILE)
        # g = dy (1 + scale), dx = rstd (g - mean(g) - x_hat mean(x_hat g))
        x_hat, dx = normalise_along(x, mul_rows(dy, factor), eps, C)
        # dshift = sum_l dy, dscale = sum_l dy x_hat
        dshift = add_rows(dshift, dy)
        dscale = add_rows(dscale, mul_rows(dy, x_hat))
        store_row(row_at(dx_ptr, b * L + l, C), dx, C)
    store_partial(partial_ptr, 0, dshift, C)
    store_partial(partial_ptr, 1, dscale, C)
