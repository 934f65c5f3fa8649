"""Device functions of the kernels that work on rows: one program a few rows, each row in registers.

A row of C columns is a tuple of tiles, all TILE columns wide and laid out alike: they are added up within each thread
before any exchange between threads, and none is ever converted. All arithmetic is fp32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def tile_count(c, tile):
    """Tiles of a row of c columns."""
    return -(-c // tile)


@triton.jit
def tile_columns(i: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Columns of tile i of a row, and which of them exist."""
    cols = i * TILE + tl.arange(0, TILE)
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
def load_tile(row_ptr, i: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr):
    """Tile i of a row in fp32; zeros in columns that do not exist."""
    cols, inside = tile_columns(i, C, TILE)
    return tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_row(row_ptr, C: tl.constexpr, TILE: tl.constexpr):
    """All tiles of a row."""
    row = ()
    for i in tl.static_range(tile_count(C, TILE)):
        row += (load_tile(row_ptr, i, C, TILE),)
    return row


@triton.jit
def store_tile(row_ptr, tile, i: tl.constexpr, C: tl.constexpr):
    """Round to the row's dtype and store."""
    cols, inside = tile_columns(i, C, tile.shape[0])
    tl.store(row_ptr + cols, tile.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_row(row_ptr, row, C: tl.constexpr):
    """All tiles of a row."""
    for i in tl.static_range(len(row)):
        store_tile(row_ptr, row[i], i, C)


@triton.jit
def zero_row(C: tl.constexpr, TILE: tl.constexpr):
    """A row of zeros."""
    row = ()
    for i in tl.static_range(tile_count(C, TILE)):
        row += (tl.zeros([TILE], tl.float32),)
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
def times(a, factor):
    """a factor, for one number, or whatever a tile is multiplied by."""
    row = ()
    for i in tl.static_range(len(a)):
        row += (a[i] * factor,)
    return row


@triton.jit
def add_tiles(a):
    """The sum of a row's tiles, within each thread."""
    total = a[0]
    for i in tl.static_range(1, len(a)):
        total += a[i]
    return total


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _add_three(a, b, c, a_next, b_next, c_next):
    return a + a_next, b + b_next, c + c_next


@triton.jit
def centre(x, C: tl.constexpr):
    """x - mean(x); both are zero in columns that do not exist."""
    mean = tl.sum(add_tiles(x)) / C
    row = ()
    for i in tl.static_range(len(x)):
        _, inside = tile_columns(i, C, x[i].shape[0])
        row += (tl.where(inside, x[i] - mean, 0.0),)
    return row


@triton.jit
def normalise(x, eps, C: tl.constexpr):
    """x_hat = (x - mean(x)) rstd; two passes over registers, so that a large mean costs no digits."""
    centred = centre(x, C)
    # in the order of normalise_along, whose x_hat is the same to the last bit
    variance = tl.reduce(add_tiles(mul_rows(centred, centred)), 0, _add) / C
    return times(centred, tl.rsqrt(variance + eps))


@triton.jit
def normalise_along(x, g, eps, C: tl.constexpr):
    """:func:`normalise`, and its derivative along g: rstd (g - mean(g) - x_hat mean(x_hat g)).

    The derivative is symmetric: it is x_hat_dot for g = x_dot, and dx for g = dx_hat. Its means ride along with the
    variance, mean(x_hat g) as rstd mean((x - mean(x)) g): one exchange between threads.
    """
    centred = centre(x, C)
    squares, along = add_tiles(mul_rows(centred, centred)), add_tiles(mul_rows(centred, g))
    variance, mean_g, along = tl.reduce((squares, add_tiles(g), along), 0, _add_three)
    rstd = tl.rsqrt(variance / C + eps)
    x_hat, mean_g, along = times(centred, rstd), mean_g / C, rstd * along / C
    row = ()
    for i in tl.static_range(len(g)):
        row += (rstd * (g[i] - mean_g - x_hat[i] * along),)
    return x_hat, row


@triton.jit
def rms_normalise(x, eps, C: tl.constexpr):
    """x_hat = x rstd, with rstd = 1 / sqrt(mean(x^2) + eps)."""
    return times(x, tl.rsqrt(tl.sum(add_tiles(mul_rows(x, x))) / C + eps))


@triton.jit
def rms_normalise_along(x, g, eps, C: tl.constexpr):
    """:func:`rms_normalise`, and its derivative along g, symmetric too: rstd (g - x_hat mean(x_hat g))."""
    rstd = tl.rsqrt(tl.sum(add_tiles(mul_rows(x, x))) / C + eps)
    x_hat, along = times(x, rstd), rstd * tl.sum(add_tiles(mul_rows(x, g))) / C
    row = ()
    for i in tl.static_range(len(g)):
        row += (rstd * (g[i] - x_hat[i] * along),)
    return x_hat, row


@triton.jit
def modulate(x_hat, shift_row, scale_row, C: tl.constexpr):
    """y = x_hat (1 + scale) + shift of one row."""
    TILE: tl.constexpr = x_hat[0].shape[0]
    y = ()
    for i in tl.static_range(len(x_hat)):
        y += (x_hat[i] * (1 + load_tile(scale_row, i, C, TILE)) + load_tile(shift_row, i, C, TILE),)
    return y


@triton.jit
def modulate_tangent(x_hat, x_hat_dot, scale_row, shift_dot_row, scale_dot_row, C: tl.constexpr):
    """y_dot = x_hat_dot (1 + scale) + x_hat scale_dot + shift_dot of one row; an absent tangent is None."""
    TILE: tl.constexpr = x_hat[0].shape[0]
    row = ()
    for i in tl.static_range(len(x_hat)):
        y_dot = tl.zeros_like(x_hat[i])
        if x_hat_dot is not None:
            y_dot = x_hat_dot[i] * (1 + load_tile(scale_row, i, C, TILE))
        if scale_dot_row is not None:
            y_dot += x_hat[i] * load_tile(scale_dot_row, i, C, TILE)
        if shift_dot_row is not None:
            y_dot += load_tile(shift_dot_row, i, C, TILE)
        row += (y_dot,)
    return row


@triton.jit
def sum_tangent(x_dot_row, y_dot_row, gate_dot_row, y, gate, C: tl.constexpr, TILE: tl.constexpr):
    """x_dot + gate_dot y + gate y_dot of one row, the tangent of x + gate y; absent terms cost nothing."""
    out_dot = zero_row(C, TILE)
    if x_dot_row is not None:
        out_dot = load_row(x_dot_row, C, TILE)
    if gate_dot_row is not None:
        out_dot = add_rows(out_dot, mul_rows(load_row(gate_dot_row, C, TILE), y))
    if y_dot_row is not None:
        out_dot = add_rows(out_dot, mul_rows(gate, load_row(y_dot_row, C, TILE)))
    return out_dot


@triton.jit
def load_factor(scale_row, C: tl.constexpr, TILE: tl.constexpr):
    """1 + scale."""
    row = ()
    for i in tl.static_range(tile_count(C, TILE)):
        row += (1 + load_tile(scale_row, i, C, TILE),)
    return row


@triton.jit
def _program():
    """This program's number, from the end: the last samples of a training batch have a tangent, take longest and start
    first.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def rows_of_program(L, rows_per_program):
    """The sample of this program, its first row and the end of its rows; a program never straddles samples."""
    chunks = tl.cdiv(L, rows_per_program)
    first = _program() % chunks * rows_per_program
    return (_program() // chunks).to(tl.int64), first, tl.minimum(first + rows_per_program, L)


@triton.jit
def store_partial(partial_ptr, index, total, C: tl.constexpr):
    """This program's sum over its rows, as its row of the index-th block of partial sums (programs, C)."""
    row = index * tl.num_programs(0).to(tl.int64) + _program()
    store_row(row_at(partial_ptr, row, C), total, C)
