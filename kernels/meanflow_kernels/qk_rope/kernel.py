"""RMSNorm of each head's query and key, rotated by positions, its forward-mode derivative and its backward.

A token's heads are tiles [HEADS, BLOCK_D]; the norm's sums and the rotation's pairs lie within a head. All arithmetic
is fp32.
"""

import triton
import triton.language as tl

from ..rows.kernel import row_at, rows_of_program, store_partial


@triton.jit
def _tile(i: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of the i-th tile of heads, and which of them exist."""
    head, cols = tl.arange(0, HEADS) + i * HEADS, tl.arange(0, BLOCK_D)
    return head[:, None] * D + cols[None, :], (cols < D)[None, :]


@triton.jit
def _load(row_ptr, i: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The i-th tile of heads in fp32; zeros in columns that do not exist."""
    offs, mask = _tile(i, HEADS, D, BLOCK_D)
    return tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(row_ptr, tile, i: tl.constexpr, D: tl.constexpr):
    offs, mask = _tile(i, tile.shape[0], D, tile.shape[1])
    tl.store(row_ptr + offs, tile.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A vector for all heads, [1, BLOCK], in fp32."""
    cols = tl.arange(0, BLOCK)
    return tl.load(ptr + cols, mask=cols < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rotate(x, cos, sin):
    """Columns (2 i, 2 i + 1) of x [HEADS, BLOCK_D] by the angles of cos and sin [1, BLOCK_D / 2].

    The multiply-adds are written out: of two products the compiler would choose which one to round by what stands
    beside them, and a primal beside a tangent would differ from one alone in the last bit.
    """
    HEADS: tl.constexpr = x.shape[0]
    BLOCK_D: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [HEADS, BLOCK_D // 2, 2]))
    cos, sin = tl.broadcast_to(cos, even.shape), tl.broadcast_to(sin, even.shape)
    return tl.reshape(tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(even, sin, odd * cos)), [HEADS, BLOCK_D])


@triton.jit
def _rstd(x, eps, D: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each head, [HEADS, 1]."""
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


@triton.jit
def _normalise_along(x, g, eps, D: tl.constexpr):
    """x_hat = rstd x, and its derivative along g, which is symmetric: rstd (g - x_hat mean(x_hat g))."""
    rstd = _rstd(x, eps, D)
    x_hat = rstd * x
    return x_hat, rstd * (g - x_hat * (tl.sum(x_hat * g, 1) / D)[:, None])


@triton.jit
def _norm_rope(
    x_row,  # (H, D), of one token as the rest
    weight,  # [1, BLOCK_D]
    cos,  # [1, BLOCK_D / 2]
    sin,  # [1, BLOCK_D / 2]
    y_row,  # (H, D)
    x_dot_row,  # (H, D); None in a sample without a tangent
    y_dot_row,  # (H, D); None in a sample without a tangent
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    BLOCK_D: tl.constexpr = weight.shape[1]
    for i in tl.static_range(H // HEADS):
        # y = R(weight x_hat), y_dot = R(weight x_hat_dot)
        x = _load(x_row, i, HEADS, D, BLOCK_D)
        if y_dot_row is None:
            x_hat = _rstd(x, eps, D) * x
        else:
            x_hat, x_hat_dot = _normalise_along(x, _load(x_dot_row, i, HEADS, D, BLOCK_D), eps, D)
            _store(y_dot_row, _rotate(weight * x_hat_dot, cos, sin), i, D)
        _store(y_row, _rotate(weight * x_hat, cos, sin), i, D)


@triton.jit
def _qk_rope_rows(
    qk_ptr,  # (L, 2 H D), of one sample as the rest
    q_weight,  # [1, BLOCK_D]
    k_weight,  # [1, BLOCK_D]
    cos_ptr,  # (L, D / 2)
    sin_ptr,  # (L, D / 2)
    q_ptr,  # (L, H D)
    k_ptr,  # (L, H D)
    qk_dot_ptr,  # (L, 2 H D); None in a sample without a tangent
    q_dot_ptr,  # (L, H D); None in a sample without a tangent
    k_dot_ptr,  # (L, H D); None in a sample without a tangent
    stride_qk_l,
    stride_qk_dot_l,
    first,
    end,
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    C: tl.constexpr = H * D
    HALF: tl.constexpr = D // 2
    BLOCK_HALF: tl.constexpr = q_weight.shape[1] // 2
    for l in tl.range(first, end, num_stages=STAGES):
        cos = _load_vector(cos_ptr + l * HALF, HALF, BLOCK_HALF)
        sin = _load_vector(sin_ptr + l * HALF, HALF, BLOCK_HALF)
        row = row_at(qk_ptr, l * stride_qk_l, ALIGN)
        q_row, k_row = row_at(q_ptr, l, C), row_at(k_ptr, l, C)
        if qk_dot_ptr is None:
            _norm_rope(row, q_weight, cos, sin, q_row, None, None, eps, H, HEADS, D)
            _norm_rope(row + C, k_weight, cos, sin, k_row, None, None, eps, H, HEADS, D)
        else:
            row_dot = row_at(qk_dot_ptr, l * stride_qk_dot_l, ALIGN)
            q_dot_row, k_dot_row = row_at(q_dot_ptr, l, C), row_at(k_dot_ptr, l, C)
            _norm_rope(row, q_weight, cos, sin, q_row, row_dot, q_dot_row, eps, H, HEADS, D)
            _norm_rope(row + C, k_weight, cos, sin, k_row, row_dot + C, k_dot_row, eps, H, HEADS, D)


@triton.jit
def _qk_rope_kernel(
    qk_ptr,  # (B, L, 2 H D)
    q_weight_ptr,  # (D,)
    k_weight_ptr,  # (D,)
    cos_ptr,  # (L, D / 2), contiguous
    sin_ptr,  # (L, D / 2), contiguous
    q_ptr,  # (B, L, H D), contiguous
    k_ptr,  # (B, L, H D), contiguous
    qk_dot_ptr,  # (n, L, 2 H D), of samples tangent_start to tangent_start + n; None where no tangent is asked for
    q_dot_ptr,  # (n, L, H D), contiguous; None where no tangent is asked for
    k_dot_ptr,  # (n, L, H D), contiguous; None where no tangent is asked for
    stride_qk_b,
    stride_qk_l,
    stride_qk_dot_b,
    stride_qk_dot_l,
    L,
    rows_per_program,
    tangent_start,
    tangent_samples,
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first, end = rows_of_program(L, rows_per_program)
    b_dot = b - tangent_start
    qk_ptr = row_at(qk_ptr, b * stride_qk_b, ALIGN)
    q_ptr = row_at(q_ptr, b * L, H * D)
    k_ptr = row_at(k_ptr, b * L, H * D)
    qk_dot_ptr = row_at(qk_dot_ptr, b_dot * stride_qk_dot_b, ALIGN)
    q_dot_ptr = row_at(q_dot_ptr, b_dot * L, H * D)
    k_dot_ptr = row_at(k_dot_ptr, b_dot * L, H * D)
    q_weight, k_weight = _load_vector(q_weight_ptr, D, BLOCK_D), _load_vector(k_weight_ptr, D, BLOCK_D)
    primal = (qk_ptr, q_weight, k_weight, cos_ptr, sin_ptr, q_ptr, k_ptr)
    share = (stride_qk_l, stride_qk_dot_l, first, end)
    # a loop of its own for samples without a tangent: they pay nothing for those that have one
    if qk_dot_ptr is not None and (b_dot >= 0) & (b_dot < tangent_samples):
        _qk_rope_rows(*primal, qk_dot_ptr, q_dot_ptr, k_dot_ptr, *share, eps, H, HEADS, D, ALIGN, STAGES)
    else:
        _qk_rope_rows(*primal, None, None, None, *share, eps, H, HEADS, D, ALIGN, STAGES)


@triton.jit
def _norm_rope_bwd(
    x_row,  # (H, D), of one token as the rest
    weight,  # [1, BLOCK_D]
    cos,  # [1, BLOCK_D / 2]
    sin,  # [1, BLOCK_D / 2]
    dy_row,  # (H, D)
    dx_row,  # (H, D)
    dweight,  # [HEADS, BLOCK_D]
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
):
    """Stores dx, and returns dweight with this token's share."""
    HEADS: tl.constexpr = dweight.shape[0]
    BLOCK_D: tl.constexpr = dweight.shape[1]
    for i in tl.static_range(H // HEADS):
        x = _load(x_row, i, HEADS, D, BLOCK_D)
        # dz = R^T dy with z = weight x_hat, dx = rstd (g - x_hat mean(x_hat g)) with g = weight dz
        dz = _rotate(_load(dy_row, i, HEADS, D, BLOCK_D), cos, -sin)
        x_hat, dx = _normalise_along(x, weight * dz, eps, D)
        _store(dx_row, dx, i, D)
        # dweight = sum over heads and rows of dz x_hat
        dweight += dz * x_hat
    return dweight


@triton.jit
def _qk_rope_bwd_kernel(
    qk_ptr,  # (B, L, 2 H D)
    q_weight_ptr,  # (D,)
    k_weight_ptr,  # (D,)
    cos_ptr,  # (L, D / 2), contiguous
    sin_ptr,  # (L, D / 2), contiguous
    dq_ptr,  # (B, L, H D)
    dk_ptr,  # (B, L, H D)
    dqk_ptr,  # (B, L, 2 H D), contiguous
    partial_ptr,  # (2, programs, D), fp32: sums over a program's rows for dq_weight, dk_weight
    stride_qk_b,
    stride_qk_l,
    stride_dq_b,
    stride_dq_l,
    stride_dk_b,
    stride_dk_l,
    L,
    rows_per_program,
    eps,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):
    C: tl.constexpr = H * D
    HALF: tl.constexpr = D // 2
    b, first, end = rows_of_program(L, rows_per_program)
    q_weight, k_weight = _load_vector(q_weight_ptr, D, BLOCK_D), _load_vector(k_weight_ptr, D, BLOCK_D)
    dq_weight, dk_weight = tl.zeros([HEADS, BLOCK_D], tl.float32), tl.zeros([HEADS, BLOCK_D], tl.float32)
    for l in tl.range(first, end, num_stages=STAGES):
        cos = _load_vector(cos_ptr + l * HALF, HALF, BLOCK_D // 2)
        sin = _load_vector(sin_ptr + l * HALF, HALF, BLOCK_D // 2)
        row = row_at(qk_ptr, b * stride_qk_b + l * stride_qk_l, ALIGN)
        dq_row = row_at(dq_ptr, b * stride_dq_b + l * stride_dq_l, ALIGN)
        dk_row = row_at(dk_ptr, b * stride_dk_b + l * stride_dk_l, ALIGN)
        dqk_row = row_at(dqk_ptr, b * L + l, 2 * C)
        dq_weight = _norm_rope_bwd(row, q_weight, cos, sin, dq_row, dqk_row, dq_weight, eps, H, D)
        dk_weight = _norm_rope_bwd(row + C, k_weight, cos, sin, dk_row, dqk_row + C, dk_weight, eps, H, D)
    store_partial(partial_ptr, 0, (tl.sum(dq_weight, 0),), D)
    store_partial(partial_ptr, 1, (tl.sum(dk_weight, 0),), D)
