"""Gated residual + the next adaln in one pass over the rows, its forward-mode derivative and its backward."""

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
    sum_tangent,
    zero_row,
)


@triton.jit
def _gate_adaln_rows(
    x_ptr,  # (L, C), of one sample as the rest
    y_ptr,  # (L, C)
    gate_row,  # (C,)
    shift_row,  # (C,)
    scale_row,  # (C,)
    bias_ptr,  # (C,) or None
    x_out_ptr,  # (L, C)
    h_ptr,  # (L, C)
    x_dot_ptr,  # (L, C) or None
    y_dot_ptr,  # (L, C) or None
    gate_dot_row,  # (C,) or None
    shift_dot_row,  # (C,) or None
    scale_dot_row,  # (C,) or None
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
        gate = load_row(gate_row, C, TILE)
        x = load_row(row_at(x_ptr, l * stride_x_l, ALIGN), C, TILE)
        if bias_ptr is not None:
            y = add_rows(y, load_row(bias_ptr, C, TILE))
        # x_out_dot = x_dot + gate_dot (y + bias) + gate y_dot
        if h_dot_ptr is not None:
            # before the first exchange between threads, so that all four rows are on their way at once
            x_dot_row = row_at(x_dot_ptr, l * stride_x_dot_l, ALIGN)
            y_dot_row = row_at(y_dot_ptr, l * stride_y_dot_l, ALIGN)
            x_dot = sum_tangent(x_dot_row, y_dot_row, gate_dot_row, y, gate, C, TILE)
            store_row(row_at(x_out_dot_ptr, l, C), x_dot, C)
        # x_out = x + gate (y + bias)
        x = add_rows(x, mul_rows(gate, y))
        store_row(row_at(x_out_ptr, l, C), x, C)
        # x_hat = rstd (x_out - mean(x_out))
        # x_hat_dot = rstd (x_out_dot - mean(x_out_dot) - x_hat mean(x_hat x_out_dot))
        if h_dot_ptr is None:
            x_hat = normalise(x, eps, C)
        else:
            x_hat, x_hat_dot = normalise_along(x, x_dot, eps, C)
        # h = x_hat (1 + scale) + shift
        store_row(row_at(h_ptr, l, C), modulate(x_hat, shift_row, scale_row, C), C)
        # h_dot = x_hat_dot (1 + scale) + x_hat scale_dot + shift_dot
        if h_dot_ptr is not None:
            h_dot = modulate_tangent(x_hat, x_hat_dot, scale_row, shift_dot_row, scale_dot_row, C)
            store_row(row_at(h_dot_ptr, l, C), h_dot, C)


@triton.jit
def _gate_adaln_kernel(
    x_ptr,  # (B, L, C)
    y_ptr,  # (B, L, C)
    gate_ptr,  # (B, C)
    shift_ptr,  # (B, C)
    scale_ptr,  # (B, C)
    bias_ptr,  # (C,), or None
    x_out_ptr,  # (B, L, C), contiguous
    h_ptr,  # (B, L, C), contiguous
    x_dot_ptr,  # (n, L, C) or None; the tangents of samples tangent_start to tangent_start + n
    y_dot_ptr,  # (n, L, C) or None
    gate_dot_ptr,  # (n, C) or None
    shift_dot_ptr,  # (n, C) or None
    scale_dot_ptr,  # (n, C) or None
    x_out_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    h_dot_ptr,  # (n, L, C), contiguous; None where no tangent is asked for
    stride_x_b,
    stride_x_l,
    stride_y_b,
    stride_y_l,
    stride_gate_b,
    stride_shift_b,
    stride_scale_b,
    stride_x_dot_b,
    stride_x_dot_l,
    stride_y_dot_b,
    stride_y_dot_l,
    stride_gate_dot_b,
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
    y_ptr = row_at(y_ptr, b * stride_y_b, ALIGN)
    gate_row = row_at(gate_ptr, b * stride_gate_b, ALIGN)
    shift_row = row_at(shift_ptr, b * stride_shift_b, ALIGN)
    scale_row = row_at(scale_ptr, b * stride_scale_b, ALIGN)
    x_out_ptr = row_at(x_out_ptr, b * L, C)
    h_ptr = row_at(h_ptr, b * L, C)
    x_dot_ptr = row_at(x_dot_ptr, b_dot * stride_x_dot_b, ALIGN)
    y_dot_ptr = row_at(y_dot_ptr, b_dot * stride_y_dot_b, ALIGN)
    gate_dot_row = row_at(gate_dot_ptr, b_dot * stride_gate_dot_b, ALIGN)
    shift_dot_row = row_at(shift_dot_ptr, b_dot * stride_shift_dot_b, ALIGN)
    scale_dot_row = row_at(scale_dot_ptr, b_dot * stride_scale_dot_b, ALIGN)
    x_out_dot_ptr = row_at(x_out_dot_ptr, b_dot * L, C)
    h_dot_ptr = row_at(h_dot_ptr, b_dot * L, C)
    primal = (x_ptr, y_ptr, gate_row, shift_row, scale_row, bias_ptr, x_out_ptr, h_ptr)
    share = (stride_x_l, stride_y_l, stride_x_dot_l, stride_y_dot_l, first, end)
    # a loop of its own for samples without a tangent: they pay nothing for those that have one
    if h_dot_ptr is not None and (b_dot >= 0) & (b_dot < tangent_samples):
        _gate_adaln_rows(
            *primal,
            x_dot_ptr,
            y_dot_ptr,
            gate_dot_row,
            shift_dot_row,
            scale_dot_row,
            x_out_dot_ptr,
            h_dot_ptr,
            *share,
            eps,
            C,
            TILE,
            ALIGN,
            STAGES,
        )
    else:
        _gate_adaln_rows(*primal, None, None, None, None, None, None, None, *share, eps, C, TILE, ALIGN, STAGES)


@triton.jit
def _gate_adaln_bwd_kernel(
    x_out_ptr,  # (B, L, C), contiguous: the forward's result
    y_ptr,  # (B, L, C)
    gate_ptr,  # (B, C)
    scale_ptr,  # (B, C)
    bias_ptr,  # (C,), or None
    dx_out_ptr,  # (B, L, C), or None where nothing but h was used
    dh_ptr,  # (B, L, C)
    dx_ptr,  # (B, L, C), contiguous
    dy_ptr,  # (B, L, C), contiguous
    partial_ptr,  # (3 or 4, programs, C), fp32: sums over a program's rows for dshift, dscale, dgate and dbias
    stride_y_b,
    stride_y_l,
    stride_gate_b,
    stride_scale_b,
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
    gate = load_row(row_at(gate_ptr, b * stride_gate_b, ALIGN), C, TILE)
    factor = load_factor(row_at(scale_ptr, b * stride_scale_b, ALIGN), C, TILE)
    dshift, dscale, dgate = zero_row(C, TILE), zero_row(C, TILE), zero_row(C, TILE)
    dx_sum = zero_row(C, TILE)
    for l in tl.range(first, end, num_stages=STAGES):
        x_out = load_row(row_at(x_out_ptr, b * L + l, C), C, TILE)
        dh = load_row(row_at(dh_ptr, b * stride_dh_b + l * stride_dh_l, ALIGN), C, TILE)
        # g = dh (1 + scale), dx = rstd (g - mean(g) - x_hat mean(x_hat g)) + dx_out
        x_hat, dx = normalise_along(x_out, mul_rows(dh, factor), eps, C)
        # dshift = sum_l dh, dscale = sum_l dh x_hat
        dshift = add_rows(dshift, dh)
        dscale = add_rows(dscale, mul_rows(dh, x_hat))
        if dx_out_ptr is not None:
            dx = add_rows(dx, load_row(row_at(dx_out_ptr, b * stride_dx_out_b + l * stride_dx_out_l, ALIGN), C, TILE))
        # dgate = sum_l (y + bias) dx, dy = gate dx, dbias = sum_l dy
        y = load_row(row_at(y_ptr, b * stride_y_b + l * stride_y_l, ALIGN), C, TILE)
        dgate = add_rows(dgate, mul_rows(y, dx))
        if bias_ptr is not None:
            dx_sum = add_rows(dx_sum, dx)
        store_row(row_at(dx_ptr, b * L + l, C), dx, C)
        store_row(row_at(dy_ptr, b * L + l, C), mul_rows(gate, dx), C)
    store_partial(partial_ptr, 0, dshift, C)
    store_partial(partial_ptr, 1, dscale, C)
    if bias_ptr is not None:
        dgate = add_rows(dgate, mul_rows(load_row(bias_ptr, C, TILE), dx_sum))
        store_partial(partial_ptr, 3, mul_rows(gate, dx_sum), C)
    store_partial(partial_ptr, 2, dgate, C)
