"""SwiGLU of a packed product, a vector through its derivative, and the backward."""

import triton
import triton.language as tl


@triton.jit
def _silu(a):
    """silu(a) = a s and its derivative s (1 + a (1 - s)), with s = sigmoid(a)."""
    s = tl.sigmoid(a)
    return a * s, s * (1 + a * (1 - s))


@triton.jit
def _units_of_program(H: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's units, each UNIT columns of one row, and their rows, [BLOCK / UNIT].

    No unit straddles rows, so the compiler sees its contiguous elements whatever multiple of UNIT the width is, and no
    lane idles at the end of a row.
    """
    UNITS: tl.constexpr = H // UNIT
    COUNT: tl.constexpr = BLOCK // UNIT
    first = tl.program_id(0).to(tl.int64) * COUNT
    unit = tl.arange(0, COUNT)
    # one division in 64 bits a program, the others in 32
    return first + unit, first // UNITS + ((first % UNITS).to(tl.int32) + unit) // UNITS


@triton.jit
def _offsets(unit, row, H: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of units, [units, UNIT], within (rows, H), and of their first halves within (rows, 2 H)."""
    offs = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    return offs, offs + row[:, None] * H


@triton.jit
def _load_halves(x_ptr, offs, mask, H: tl.constexpr):
    """a and b, in fp32."""
    a = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return a, tl.load(x_ptr + offs + H, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _swiglu_kernel(
    x_ptr,  # (rows, 2 H), contiguous
    y_ptr,  # (rows, H), contiguous
    x_dot_ptr,  # (tangent_rows, 2 H), contiguous, of the rows from tangent_start on; None where there is none
    y_dot_ptr,  # (tangent_rows, H), contiguous
    units,  # of y
    tangent_start,  # in units
    tangent_units,
    H: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, row = _units_of_program(H, UNIT, BLOCK)
    offs, offs_x = _offsets(unit, row, H, UNIT)
    mask = (unit < units)[:, None]
    a, b = _load_halves(x_ptr, offs_x, mask, H)
    # y = silu(a) b
    y, slope = _silu(a)
    tl.store(y_ptr + offs, (y * b).to(y_ptr.dtype.element_ty), mask=mask)
    # y_dot = silu'(a) a_dot b + silu(a) b_dot
    if x_dot_ptr is not None:
        unit -= tangent_start
        mask_dot = ((unit >= 0) & (unit < tangent_units))[:, None]
        offs, offs_x = _offsets(unit, row - tangent_start // (H // UNIT), H, UNIT)
        a_dot, b_dot = _load_halves(x_dot_ptr, offs_x, mask_dot, H)
        y_dot = slope * a_dot * b + y * b_dot
        tl.store(y_dot_ptr + offs, y_dot.to(y_dot_ptr.dtype.element_ty), mask=mask_dot)


@triton.jit
def _swiglu_bwd_kernel(
    x_ptr,  # (rows, 2 H), contiguous
    dy_ptr,  # (rows, H), contiguous
    dx_ptr,  # (rows, 2 H), contiguous
    units,  # of dy
    H: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit, row = _units_of_program(H, UNIT, BLOCK)
    offs, offs_x = _offsets(unit, row, H, UNIT)
    mask = (unit < units)[:, None]
    a, b = _load_halves(x_ptr, offs_x, mask, H)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # da = silu'(a) b dy, db = silu(a) dy
    y, slope = _silu(a)
    tl.store(dx_ptr + offs_x, (slope * b * dy).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + offs_x + H, (y * dy).to(dx_ptr.dtype.element_ty), mask=mask)
