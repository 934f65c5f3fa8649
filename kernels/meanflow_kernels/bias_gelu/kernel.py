"""Bias + tanh-GELU, a vector through its derivative, and the backward with the bias's share."""

import triton
import triton.language as tl

from ..constants import LOG2_E


@triton.jit
def _gelu(u):
    """tanh-GELU and its derivative at u, by one exponential.

    0.5 (1 + tanh(a / 2)) = sigmoid(a), so gelu(u) = u s with s = sigmoid(a), a = 2 sqrt(2/pi) (u + 0.044715 u^3), and
    gelu'(u) = s + u s (1 - s) a'.
    """
    C: tl.constexpr = 0.044715
    K: tl.constexpr = 1.5957691216057308  # 2 sqrt(2/pi)
    K_LOG2E: tl.constexpr = K * LOG2_E
    square = u * u
    e = tl.exp2(-u * (K_LOG2E + K_LOG2E * C * square))
    s = 1 / (1 + e)
    y = u * s
    # 1 - s cancels where s is near 1, and e s is infinity times zero where s is near 0
    rest = tl.where(u > 0, e * s, 1 - s)
    return y, s + y * rest * (K + 3 * K * C * square)


@triton.jit
def _tile_of_program(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's place among the chunks of rows, and its columns; neighbours share rows."""
    column_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    cols = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tl.program_id(0) // column_blocks).to(tl.int64), cols


@triton.jit
def _bias_gelu_kernel(
    x_ptr,  # (rows, C), contiguous
    bias_ptr,  # (C,)
    y_ptr,  # (rows, C), contiguous
    x_dot_ptr,  # (tangent_rows, C), contiguous, of the rows from tangent_start on; None where there is none
    y_dot_ptr,  # (tangent_rows, C), contiguous
    rows,
    tangent_start,
    tangent_rows,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, cols = _tile_of_program(C, BLOCK_C)
    row = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = cols < C
    mask = (row < rows)[:, None] & inside[None, :]
    offs = row[:, None] * C + cols[None, :]
    # y = gelu(x + bias), [BLOCK_R, BLOCK_C]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y, slope = _gelu(x + bias[None, :])
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    # y_dot = gelu'(x + bias) x_dot, [BLOCK_R, BLOCK_C]
    if x_dot_ptr is not None:
        row_dot = row - tangent_start
        mask_dot = ((row_dot >= 0) & (row_dot < tangent_rows))[:, None] & inside[None, :]
        offs_dot = row_dot[:, None] * C + cols[None, :]
        x_dot = tl.load(x_dot_ptr + offs_dot, mask=mask_dot, other=0.0).to(tl.float32)
        tl.store(y_dot_ptr + offs_dot, (slope * x_dot).to(y_dot_ptr.dtype.element_ty), mask=mask_dot)


@triton.jit
def _bias_gelu_bwd_kernel(
    x_ptr,  # (rows, C), contiguous
    bias_ptr,  # (C,)
    dy_ptr,  # (rows, C), contiguous
    dx_ptr,  # (rows, C), contiguous
    partial_ptr,  # (chunks, C), fp32: sums of dx over a chunk of rows
    rows,
    rows_per_chunk,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    chunk, cols = _tile_of_program(C, BLOCK_C)
    inside = cols < C
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    first = chunk * rows_per_chunk
    end = tl.minimum(first + rows_per_chunk, rows)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & inside[None, :]
        offs = row[:, None] * C + cols[None, :]
        # dx = gelu'(x + bias) dy, dbias = sum over rows of dx, [BLOCK_R, BLOCK_C]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        _, slope = _gelu(x + bias[None, :])
        dx = slope * dy
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dbias += dx
    tl.store(partial_ptr + chunk * C + cols, tl.sum(dbias, 0), mask=inside)
