"""SiLU, and a vector through its derivative: the tangent's map and the cotangent's are the same."""

import triton
import triton.language as tl


@triton.jit
def _silu_kernel(
    x_ptr,  # (N,), contiguous
    y_ptr,  # (N,), contiguous, or None where only the derivative is asked for
    x_dot_ptr,  # (tangent_size,), contiguous, of the elements from tangent_start on; None where there is none
    y_dot_ptr,  # (tangent_size,), contiguous; backward: dy and dx are in the places of x_dot and y_dot
    N,
    tangent_start,
    tangent_size,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    if y_ptr is not None:
        # y = x s
        tl.store(y_ptr + offs, (x * s).to(y_ptr.dtype.element_ty), mask=offs < N)
    if x_dot_ptr is not None:
        # y_dot = s (1 + x (1 - s)) x_dot
        offs_dot = offs - tangent_start
        mask_dot = (offs_dot >= 0) & (offs_dot < tangent_size)
        x_dot = tl.load(x_dot_ptr + offs_dot, mask=mask_dot, other=0.0).to(tl.float32)
        tl.store(y_dot_ptr + offs_dot, (s * (1 + x * (1 - s)) * x_dot).to(y_dot_ptr.dtype.element_ty), mask=mask_dot)
