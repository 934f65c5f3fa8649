"""Gated residual + the next rmsnorm in one pass over the rows, its forward-mode derivative and its backward."""

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
    sum_tangent,
    zero_row,
)


@triton.jit
def _gate_rmsnorm_rows(
    x_ptr,  # (L, C), of one sample as the rest
    y_ptr,  # (L, C)
    gate_ptr,  # (C,), of all
    weight_ptr,  # (C,), of all
    x_out_ptr,  # (L, C)
    h_ptr,  # (L, C)
    x_dot_ptr,  # (L, C) or None
    y_dot_ptr,  # (L, C) or None
    x_out_dot_ptr,  # (L, C); None in a sample without a tangent
    h_dot_ptr,  # (L, C); None in a sample without a tangent
    stride_x_l,
    stride_y_l,
    stride_x_dot_l,
    stride_y_dot_l,
    first,
    end,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    for l in tl.range(first, end, num_stages=STAGES):
        y = load_row(row_at(y_ptr, l * stride_y_l, ALIGN), C, TILE)
        gate, weight = load_row(gate_ptr, C, TILE), load_row(weight_ptr, C, TILE)
        x = load_row(row_at(x_ptr, l * stride_x_l, ALIGN), C, TILE)
        # x_out_dot = x_dot + gate y_dot
        if h_dot_ptr is not None:
            # before the first exchange between threads, so that all four rows are on their way at once
            x_dot_row = row_at(x_dot_ptr, l * stride_x_dot_l, ALIGN)
            y_dot_row = row_at(y_dot_ptr, l * stride_y_dot_l, ALIGN)
            x_dot = sum_tangent(x_dot_row, y_dot_row, None, y, gate, C, TILE)
            store_row(row_at(x_out_dot_ptr, l, C), x_dot, C)
        # x_out = x + gate y
        x = add_rows(x, mul_rows(gate, y))
        store_row(row_at(x_out_ptr, l, C), x, C)
        # x_hat = rstd x_out, x_hat_dot = rstd (x_out_dot - x_hat mean(x_hat x_out_dot))
        if h_dot_ptr is None:
            x_hat = rms_normalise(x, eps, C)
        else:
            x_hat, x_hat_dot = rms_normalise_along(x, x_dot, eps, C)
        # h = weight x_hat, h_dot = weight x_hat_dot
        store_row(row_at(h_ptr, l, C), mul_rows(weight, x_hat), C)
        if h_dot_ptr is not None:
            store_row(row_at(h_dot_ptr, l, C), mul_rows(weight, x_hat_dot), C)


@triton.jit
def _gate_rmsnorm_kernel(
    x_ptr,  # (B, L, C)
    y_ptr,  # (B, L, C)
    gate_ptr,  # (C,)
    weight_ptr,  # (C,)
    x_out_ptr,  # (B, L, C), contiguous
    h_ptr,  # (B, L, C), contiguous
    x_dot_ptr,  # (n, L, C) or None; the tangents of samples tangent_start to tangent_start + n
    y_dot_ptr,  # (n, L, C) or None
    x_out_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    h_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    stride_x_b,
    stride_x_l,
    stride_y_b,
    stride_y_l,
    stride_x_dot_b,
    stride_x_dot_l,
    stride_y_dot_b,
    stride_y_dot_l,
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
    y_ptr = row_at(y_ptr, b * stride_y_b, ALIGN)
    x_out_ptr = row_at(x_out_ptr, b * L, C)
    h_ptr = row_at(h_ptr, b * L, C)
    x_dot_ptr = row_at(x_dot_ptr, b_dot * stride_x_dot_b, ALIGN)
    y_dot_ptr = row_at(y_dot_ptr, b_dot * stride_y_dot_b, ALIGN)
    x_out_dot_ptr = row_at(x_out_dot_ptr, b_dot * L, C)
    h_dot_ptr = row_at(h_dot_ptr, b_dot * L, C)
    primal = (x_ptr, y_ptr, gate_ptr, weight_ptr, x_out_ptr, h_ptr)
    share = (stride_x_l, stride_y_l, stride_x_dot_l, stride_y_dot_l, first, end)
    # a loop of its own for samples without a tangent: they pay nothing for those that have one
    if h_dot_ptr is not None and (b_dot >= 0) & (b_dot < tangent_samples):
        _gate_rmsnorm_rows(*primal, x_dot_ptr, y_dot_ptr, x_out_dot_ptr, h_dot_ptr, *share, eps, C, TILE, ALIGN, STAGES)
    else:
        _gate_rmsnorm_rows(*primal, None, None, None, None, *share, eps, C, TILE, ALIGN, STAGES)


@triton.jit
def _gate_rmsnorm_bwd_kernel(
    x_out_ptr,  # (B, L, C), contiguous: the forward's result
    y_ptr,  # (B, L, C)
    gate_ptr,  # (C,)
    weight_ptr,  # (C,)
    dx_out_ptr,  # (B, L, C), or None where nothing but h was used
    dh_ptr,  # (B, L, C)
    dx_ptr,  # (B, L, C), contiguous
    dy_ptr,  # (B, L, C), contiguous
    partial_ptr,  # (2, programs, C), fp32: sums over a program's rows for dgate, dweight
    stride_y_b,
    stride_y_l,
    stride_dx_out_b,
    stride_dx_out_l,
    stride_dh_b,
    stride_dh_l,
    L,
    rows_per_program,
    eps,
    C: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    # held in registers: the pipelined loop would fetch them anew for every row, past L1
    gate, weight = load_row(gate_ptr, C, TILE), load_row(weight_ptr, C, TILE)
    dgate, dweight = zero_row(C, TILE), zero_row(C, TILE)
    for l in tl.range(first, end, num_stages=STAGES):
        x_out = load_row(row_at(x_out_ptr, b * L + l, C), C, TILE)
        dh = load_row(row_at(dh_ptr, b * stride_dh_b + l * stride_dh_l, ALIGN), C, TILE)
        # g = weight dh, dx = rstd (g - x_hat mean(x_hat g)) + dx_out, dweight = sum over rows of dh x_hat
        x_hat, dx = rms_normalise_along(x_out, mul_rows(weight, dh), eps, C)
        dweight = add_rows(dweight, mul_rows(dh, x_hat))
        if dx_out_ptr is not None:
            dx = add_rows(dx, load_row(row_at(dx_out_ptr, b * stride_dx_out_b + l * stride_dx_out_l, ALIGN), C, TILE))
        # dgate = sum over rows of y dx, dy = gate dx
        y = load_row(row_at(y_ptr, b * stride_y_b + l * stride_y_l, ALIGN), C, TILE)
        dgate = add_rows(dgate, mul_rows(y, dx))
        store_row(row_at(dx_ptr, b * L + l, C), dx, C)
        store_row(row_at(dy_ptr, b * L + l, C), mul_rows(gate, dx), C)
    store_partial(partial_ptr, 0, dgate, C)
    store_partial(partial_ptr, 1, dweight, C)
