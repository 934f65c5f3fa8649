"""Sinusoidal features of a time, their tangent, and the cotangent of the time."""

import triton
import triton.language as tl


@triton.jit
def _angles(t, log2_ratio, BLOCK: tl.constexpr):
    """Indices i, the angles t f and the frequencies f = max_period^(-i / half) = 2^(-i log2_ratio)."""
    i = tl.arange(0, BLOCK)
    frequencies = tl.exp2(-i.to(tl.float32) * log2_ratio)
    return i, t * frequencies, frequencies


@triton.jit
def _timestep_embedding_kernel(
    t_ptr,  # (B,)
    y_ptr,  # (B, DIM), contiguous: HALF cosines, HALF sines, and a zero where DIM is odd
    t_dot_ptr,  # (n,): tangents of samples dot_start to dot_start + n; None where there is none
    y_dot_ptr,  # (n, DIM), contiguous
    stride_t,
    stride_t_dot,
    log2_ratio,
    dot_start,
    n,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + b * stride_t).to(tl.float32)
    i, angles, frequencies = _angles(t, log2_ratio, BLOCK)
    cos, sin = tl.cos(angles), tl.sin(angles)
    row = y_ptr + b * DIM
    tl.store(row + i, cos.to(y_ptr.dtype.element_ty), mask=i < HALF)
    tl.store(row + HALF + i, sin.to(y_ptr.dtype.element_ty), mask=i < HALF)
    if DIM % 2:
        tl.store(row + DIM - 1, 0.0)
    if t_dot_ptr is not None:
        b_dot = b - dot_start
        if (b_dot >= 0) & (b_dot < n):
            rate = tl.load(t_dot_ptr + b_dot * stride_t_dot).to(tl.float32) * frequencies
            row_dot = y_dot_ptr + b_dot * DIM
            tl.store(row_dot + i, (-sin * rate).to(y_dot_ptr.dtype.element_ty), mask=i < HALF)
            tl.store(row_dot + HALF + i, (cos * rate).to(y_dot_ptr.dtype.element_ty), mask=i < HALF)
            if DIM % 2:
                tl.store(row_dot + DIM - 1, 0.0)


@triton.jit
def _timestep_embedding_bwd_kernel(
    t_ptr,  # (B,)
    dy_ptr,  # (B, DIM), contiguous
    dt_ptr,  # (B,), contiguous
    stride_t,
    log2_ratio,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + b * stride_t).to(tl.float32)
    i, angles, frequencies = _angles(t, log2_ratio, BLOCK)
    row = dy_ptr + b * DIM
    dcos = tl.load(row + i, mask=i < HALF, other=0.0).to(tl.float32)
    dsin = tl.load(row + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    dt = tl.sum((tl.cos(angles) * dsin - tl.sin(angles) * dcos) * frequencies)
    tl.store(dt_ptr + b, dt.to(dt_ptr.dtype.element_ty))
