"""LayerNorm + modulate, its forward-mode derivative and its backward: one program a few rows, each row in registers.

A row of C columns is a tuple of tiles whose widths are powers of two (1152 = 512 + 512 + 128): no lane idles at the
widths of the DiT family, where one power of two would idle up to 44 % of them. All arithmetic is fp32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _tile_widths(c):
    """The largest powers of two, 512 at most; a rest behind the first of them is one tile, rounded up to such a power.

    512 and not more: the compiler fetches all vectors of a tile at once, and 1024 columns take more registers than
    there are (gate_adaln_jvp at C = 1152, sm_90, triton 3.6: 20 bytes spilled).
    """
    widths = []
    while c > 0:
        width = min(512, 1 << (c.bit_length() - 1))
        if widths and width < 512:
            width = 1 << (c - 1).bit_length()
        widths.append(width)
        c -= width
    return widths


@triton.constexpr_function
def tile_count(c):
    """Tiles of a row of c columns."""
    return len(_tile_widths(c))


@triton.constexpr_function
def _tile_width(c, i):
    return _tile_widths(c)[i]


@triton.constexpr_function
def _tile_start(c, i):
    return sum(_tile_widths(c)[:i])


@triton.jit
def tile_columns(i: tl.constexpr, C: tl.constexpr):
    """Columns of tile i of a row, and which of them exist."""
    cols = _tile_start(C, i) + tl.arange(0, _tile_width(C, i))
    return cols, cols < C


@triton.jit
def row_at(ptr, units, UNIT: tl.constexpr):
    """Pointer to the row that starts units x UNIT elements on; None where the tensor is absent.

    UNIT is a constant, so the compiler knows the alignment of rows whatever the strides are at run time.
    """
    if ptr is None:
        row = None
    else:
        row = ptr + units * UNIT
    return row


@triton.jit
def load_tile(row_ptr, i: tl.constexpr, C: tl.constexpr, present=True):
    """Tile i of a row in fp32; zeros in columns that do not exist, and everywhere where not present."""
    cols, inside = tile_columns(i, C)
    return tl.load(row_ptr + cols, mask=inside & present, other=0.0).to(tl.float32)


@triton.jit
def load_row(row_ptr, C: tl.constexpr, present=True):
    """All tiles of a row."""
    row = ()
    for i in tl.static_range(tile_count(C)):
        row += (load_tile(row_ptr, i, C, present),)
    return row


@triton.jit
def store_tile(row_ptr, tile, i: tl.constexpr, C: tl.constexpr, present=True):
    """Round to the row's dtype and store."""
    cols, inside = tile_columns(i, C)
    tl.store(row_ptr + cols, tile.to(row_ptr.dtype.element_ty), mask=inside & present)


@triton.jit
def store_row(row_ptr, row, C: tl.constexpr, present=True):
    """All tiles of a row."""
    for i in tl.static_range(tile_count(C)):
        store_tile(row_ptr, row[i], i, C, present)


@triton.jit
def zero_row(C: tl.constexpr):
    """A row of zeros."""
    row = ()
    for i in tl.static_range(tile_count(C)):
        row += (tl.zeros([_tile_width(C, i)], tl.float32),)
    return row


@triton.jit
def add_rows(a, b):
    """a + b."""
    row = ()
    for i in tl.static_range(len(a)):
        row += (a[i] + b[i],)
    return row


@triton.jit
def mul_rows(a, b):
    """a b, elementwise."""
    row = ()
    for i in tl.static_range(len(a)):
        row += (a[i] * b[i],)
    return row


@triton.jit
def row_mean(a, C: tl.constexpr):
    """Mean over the C columns of a row that is zero in those that do not exist."""
    # tiles of one width are added up within each thread before any exchange between threads
    total = a[0]
    for i in tl.static_range(1, len(a)):
        if a[i].shape[0] == a[0].shape[0]:
            total += a[i]
    total = tl.sum(total)
    for i in tl.static_range(1, len(a)):
        if a[i].shape[0] != a[0].shape[0]:
            total += tl.sum(a[i])
    return total / C


@triton.jit
def normalise(x, eps, C: tl.constexpr):
    """x_hat = (x - mean(x)) rstd, and rstd; two passes over registers, so that a large mean costs no digits."""
    mean = row_mean(x, C)
    centred = ()
    for i in tl.static_range(len(x)):
        _, inside = tile_columns(i, C)
        centred += (tl.where(inside, x[i] - mean, 0.0),)
    rstd = tl.rsqrt(row_mean(mul_rows(centred, centred), C) + eps)
    x_hat = ()
    for i in tl.static_range(len(x)):
        x_hat += (centred[i] * rstd,)
    return x_hat, rstd


@triton.jit
def project_row(g, x_hat, rstd, C: tl.constexpr):
    """rstd (g - mean(g) - x_hat mean(x_hat g)).

    The derivative of normalise is symmetric: this is x_hat_dot for g = x_dot, and dx for g = dx_hat.
    """
    mean = row_mean(g, C)
    along = row_mean(mul_rows(x_hat, g), C)
    row = ()
    for i in tl.static_range(len(g)):
        row += (rstd * (g[i] - mean - x_hat[i] * along),)
    return row


@triton.jit
def store_modulated(y_row, x_hat, shift_row, scale_row, C: tl.constexpr):
    """y = x_hat (1 + scale) + shift of one row."""
    for i in tl.static_range(tile_count(C)):
        y = x_hat[i] * (1 + load_tile(scale_row, i, C)) + load_tile(shift_row, i, C)
        store_tile(y_row, y, i, C)


@triton.jit
def store_modulated_tangent(
    y_dot_row, x_hat, x_hat_dot, scale_row, shift_dot_row, scale_dot_row, has_tangent, C: tl.constexpr
):
    """y_dot = x_hat_dot (1 + scale) + x_hat scale_dot + shift_dot of one row; an absent tangent is None."""
    for i in tl.static_range(tile_count(C)):
        y_dot = tl.zeros_like(x_hat[i])
        if x_hat_dot is not None:
            y_dot = x_hat_dot[i] * (1 + load_tile(scale_row, i, C))
        if scale_dot_row is not None:
            y_dot += x_hat[i] * load_tile(scale_dot_row, i, C, has_tangent)
        if shift_dot_row is not None:
            y_dot += load_tile(shift_dot_row, i, C, has_tangent)
        store_tile(y_dot_row, y_dot, i, C, has_tangent)


@triton.jit
def load_factor(scale_row, C: tl.constexpr):
    """1 + scale."""
    row = ()
    for i in tl.static_range(tile_count(C)):
        row += (1 + load_tile(scale_row, i, C),)
    return row


@triton.jit
def rows_of_program(L, rows_per_program):
    """The sample of this program, its first row and the end of its rows; a program never straddles samples."""
    chunks = tl.cdiv(L, rows_per_program)
    first = tl.program_id(0) % chunks * rows_per_program
    return (tl.program_id(0) // chunks).to(tl.int64), first, tl.minimum(first + rows_per_program, L)


@triton.jit
def store_partial(partial_ptr, index, total, C: tl.constexpr):
    """This program's sum over its rows, as its row of the index-th block of partial sums (programs, C)."""
    program = index * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    store_row(row_at(partial_ptr, program, C), total, C)


@triton.jit
def _adaln_kernel(
    x_ptr,  # (B, L, C)
    shift_ptr,  # (B, C)
    scale_ptr,  # (B, C)
    y_ptr,  # (B, L, C), contiguous
    x_dot_ptr,  # (n, L, C) or None; the tangents of samples dot_start to dot_start + n
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
    dot_start,
    dot_samples,
    eps,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    b_dot = b - dot_start
    has_tangent = (b_dot >= 0) & (b_dot < dot_samples)
    shift_row = row_at(shift_ptr, b * stride_shift_b, ALIGN)
    scale_row = row_at(scale_ptr, b * stride_scale_b, ALIGN)
    shift_dot_row = row_at(shift_dot_ptr, b_dot * stride_shift_dot_b, ALIGN)
    scale_dot_row = row_at(scale_dot_ptr, b_dot * stride_scale_dot_b, ALIGN)
    for l in tl.range(first, end, num_stages=STAGES):
        x = load_row(row_at(x_ptr, b * stride_x_b + l * stride_x_l, ALIGN), C)
        if x_dot_ptr is not None:
            # fetched before anything is stored, so that both rows are on their way at once
            x_dot = load_row(row_at(x_dot_ptr, b_dot * stride_x_dot_b + l * stride_x_dot_l, ALIGN), C, has_tangent)
        x_hat, rstd = normalise(x, eps, C)
        store_modulated(row_at(y_ptr, b * L + l, C), x_hat, shift_row, scale_row, C)
        if y_dot_ptr is not None:
            x_hat_dot = None
            if x_dot_ptr is not None:
                x_hat_dot = project_row(x_dot, x_hat, rstd, C)
            y_dot_row = row_at(y_dot_ptr, b_dot * L + l, C)
            store_modulated_tangent(
                y_dot_row, x_hat, x_hat_dot, scale_row, shift_dot_row, scale_dot_row, has_tangent, C
            )


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
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    # held in registers: the pipelined loop would fetch it anew for every row, past L1
    factor = load_factor(row_at(scale_ptr, b * stride_scale_b, ALIGN), C)
    dshift, dscale = zero_row(C), zero_row(C)
    for l in tl.range(first, end, num_stages=STAGES):
        x = load_row(row_at(x_ptr, b * stride_x_b + l * stride_x_l, ALIGN), C)
        dy = load_row(row_at(dy_ptr, b * stride_dy_b + l * stride_dy_l, ALIGN), C)
        x_hat, rstd = normalise(x, eps, C)
        dshift = add_rows(dshift, dy)
        dscale = add_rows(dscale, mul_rows(dy, x_hat))
        store_row(row_at(dx_ptr, b * L + l, C), project_row(mul_rows(dy, factor), x_hat, rstd, C), C)
    store_partial(partial_ptr, 0, dshift, C)
    store_partial(partial_ptr, 1, dscale, C)
