"""Sinusoidal features of a time, their tangent, and the cotangent of the time."""

import triton
import triton.language as tl

from ..constants import LN_2


@triton.jit
def _exp2(x):
    """2^x to a rounding or so, by its Taylor series around the nearest integer.

    The hardware's is good to two units in the last place, which a time of 1000 would turn into twice torch's error.
    """
    nearest = tl.floor(x + 0.5)
    r = (x - nearest) * LN_2
    series = 1 / 120 + r * (1 / 720 + r * (1 / 5040))
    return (1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * series))))) * tl.exp2(nearest)


@triton.jit
def _angles(t, step, step_rest, BLOCK: tl.constexpr):
    """Indices i, the angles t f and the frequencies f = max_period^(-i / half) = 2^(-i (step + step_rest)).

    step has so few bits that i step is exact.
    """
    i = tl.arange(0, BLOCK)
    frequencies = _exp2(-(i.to(tl.float32) * step + i.to(tl.float32) * step_rest))
    return i, t * frequencies, frequencies


@triton.jit
def _timestep_embedding_kernel(
    t_ptr,  # (B,)
    y_ptr,  # (B, DIM), contiguous: HALF cosines, HALF sines, and a zero where DIM is odd
    t_dot_ptr,  # (tangent_samples,), of the samples from tangent_start on; None where there is none
    y_dot_ptr,  # (tangent_samples, DIM), contiguous
    stride_t,
    stride_t_dot,
    step,
    step_rest,
    tangent_start,
    tangent_samples,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + b * stride_t).to(tl.float32)
    i, angles, frequencies = _angles(t, step, step_rest, BLOCK)
    cos, sin = tl.cos(angles), tl.sin(angles)
    row = y_ptr + b * DIM
    tl.store(row + i, cos.to(y_ptr.dtype.element_ty), mask=i < HALF)
    tl.store(row + HALF + i, sin.to(y_ptr.dtype.element_ty), mask=i < HALF)
    if DIM % 2:
        tl.store(row + DIM - 1, 0.0)
    if t_dot_ptr is not None:
        b_dot = b - tangent_start
        if (b_dot >= 0) & (b_dot < tangent_samples):
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
    step,
    step_rest,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(t_ptr + b * stride_t).to(tl.float32)
    i, angles, frequencies = _angles(t, step, step_rest, BLOCK)
    row = dy_ptr + b * DIM
    dcos = tl.load(row + i, mask=i < HALF, other=0.0).to(tl.float32)
    dsin = tl.load(row + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    dt = tl.sum((tl.cos(angles) * dsin - tl.sin(angles) * dcos) * frequencies)
    tl.store(dt_ptr + b, dt.to(dt_ptr.dtype.element_ty))
