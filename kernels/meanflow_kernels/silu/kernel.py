"""SiLU, and a vector through its derivative: the tangent's map and the cotangent's are the same."""

import triton
import triton.language as tl


@triton.jit
def _silu_kernel(
    x_ptr,  # (N,), contiguous
    y_ptr,  # (N,), contiguous, or None where only the derivative is asked for
    v_ptr,  # (n,), contiguous: tangent or cotangent of elements v_start to v_start + n; None where there is none
    jv_ptr,  # (n,), contiguous: silu'(x) v
    N,
    v_start,
    n,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    if y_ptr is not None:
        tl.store(y_ptr + offs, (x * s).to(y_ptr.dtype.element_ty), mask=offs < N)
    if v_ptr is not None:
        offs_v = offs - v_start
        mask_v = (offs_v >= 0) & (offs_v < n)
        v = tl.load(v_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        tl.store(jv_ptr + offs_v, (s * (1 + x * (1 - s)) * v).to(jv_ptr.dtype.element_ty), mask=mask_v)
