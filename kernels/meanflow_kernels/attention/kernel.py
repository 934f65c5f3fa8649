"""Triton kernel of attention's forward, for the primal alone and for (primal, tangent).

B batch, H heads, M and N lengths of q and of k and v, D head dim.

A head dim is one or two column tiles: D <= BLOCK_D0, or D = BLOCK_D0 + a remainder in BLOCK_D1 (72 = 64 + 8 of 16), so
that no head dim is padded to the next power of two where a split is narrower. What is [rows, D] below is a tuple of
them, [rows, BLOCK_D0] and, where there is one, [rows, BLOCK_D1]. Batch and head strides arrive in vectors
of VEC elements (16 bytes): multiplied back by a constant they keep their divisibility, and every load is 16 bytes wide
whatever the head dim. Token strides are constants, in elements: as run-time values the addresses of four pipelined
tiles take 57 registers more (hd 64, 64x64 tiles, sm_90).

The choices of a launch config (config.py) are constants too: ONES, PACKED and SEPARATE.
"""

import triton
import triton.language as tl

from ..constants import LN_2, LOG2_E
from ..rows.kernel import add_rows, times

_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(ptr, stride_l, offs_l, offs_d, L, D: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr):
    # (rows, columns) of a matrix with contiguous columns; rows beyond L and columns beyond D are zero
    ptrs = ptr + offs_l[:, None] * stride_l + offs_d[None, :]
    if EVEN_L and EVEN_D:
        return tl.load(ptrs)
    elif EVEN_D:
        return tl.load(ptrs, mask=offs_l[:, None] < L, other=0.0)
    elif EVEN_L:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs, mask=(offs_l[:, None] < L) & (offs_d[None, :] < D), other=0.0)


@triton.jit
def load_tiles(ptr, stride_l, offs_l, L, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_L: tl.constexpr):
    """[rows, D]: the column tiles of a matrix."""
    tiles = (_load(ptr, stride_l, offs_l, tl.arange(0, D0), L, D, EVEN_L, D >= D0),)
    if D1 > 0:
        tiles += (_load(ptr, stride_l, offs_l, D0 + tl.arange(0, D1), L, D, EVEN_L, D == D0 + D1),)
    return tiles


@triton.jit
def _store(ptr, stride_l, offs_l, offs_d, x, L, D: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr):
    ptrs = ptr + offs_l[:, None] * stride_l + offs_d[None, :]
    x = x.to(ptr.dtype.element_ty)
    if EVEN_L and EVEN_D:
        tl.store(ptrs, x)
    else:
        tl.store(ptrs, x, mask=(offs_l[:, None] < L) & (offs_d[None, :] < D))


@triton.jit
def store_tiles(ptr, stride_l, offs_l, x, L, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_L: tl.constexpr):
    """x [rows, D], rounded to the dtype of what ptr points to."""
    _store(ptr, stride_l, offs_l, tl.arange(0, D0), x[0], L, D, EVEN_L, D >= D0)
    if D1 > 0:
        _store(ptr, stride_l, offs_l, D0 + tl.arange(0, D1), x[1], L, D, EVEN_L, D == D0 + D1)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """[ROWS, D] of zeros, fp32."""
    tiles = (tl.zeros([ROWS, D0], tl.float32),)
    if D1 > 0:
        tiles += (tl.zeros([ROWS, D1], tl.float32),)
    return tiles


@triton.jit
def dot_nt(a, b, PRECISION: tl.constexpr, acc=None):
    """acc + a b^T [rows of a, rows of b], for a and b [rows, D]."""
    for i in tl.static_range(len(a)):
        acc = tl.dot(a[i], tl.trans(b[i]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot(p, v, acc, PRECISION: tl.constexpr, factor=1):
    """acc factor + p v [rows of p, D], for v [rows, D] and p [rows of p, rows of v]."""
    tiles = ()
    for i in tl.static_range(len(v)):
        tiles += (tl.dot(p, v[i], acc[i] * factor, input_precision=PRECISION),)
    return tiles


@triton.jit
def place(L, H, BLOCK: tl.constexpr):
    """This program's rows of L, its head and its sample. A head's tiles are neighbours in the grid: they share L2."""
    tiles = tl.cdiv(L, BLOCK)
    offs = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return offs, (tl.program_id(0) // tiles) % H, (tl.program_id(0) // tiles // H).to(tl.int64)


@triton.jit
def rounded(x, dtype: tl.constexpr, PACKED: tl.constexpr):
    # fp32 values of x rounded to dtype. ptxas converts value by value what is read both rounded and as fp32, on a pipe
    # of a quarter of the rate; PACKED converts by pairs (the interpreter has no inline PTX)
    if not PACKED or _INTERPRETED or dtype == tl.float32:
        return x.to(dtype).to(tl.float32)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; .reg .b16 lo, hi; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {lo, hi}, t; "
            "cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )


STRIDES = [f"stride_{x}_{dim}" for x in ("q", "k", "v", "q_dot", "k_dot", "v_dot") for dim in "bh"]


# no integer is specialised: one binary serves every batch size, head count and length of a config
@triton.jit(do_not_specialize=[*STRIDES, "H", "M", "N"])
def attention_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H, D)
    v_ptr,  # (B, N, H, D)
    q_dot_ptr,  # like their primals; None where HAS_*_DOT is false
    k_dot_ptr,
    v_dot_ptr,
    o_ptr,  # (B, M, H, D) contiguous
    o_dot_ptr,  # (B, M, H, D) contiguous; None without a tangent
    lse_ptr,  # (B, H, M) fp32, natural logarithm
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_q_dot_b,
    stride_q_dot_h,
    stride_k_dot_b,
    stride_k_dot_h,
    stride_v_dot_b,
    stride_v_dot_h,
    scale,
    H,
    M,
    N,
    STRIDE_Q_L: tl.constexpr,
    STRIDE_K_L: tl.constexpr,
    STRIDE_V_L: tl.constexpr,
    STRIDE_Q_DOT_L: tl.constexpr,
    STRIDE_K_DOT_L: tl.constexpr,
    STRIDE_V_DOT_L: tl.constexpr,
    HAS_Q_DOT: tl.constexpr,
    HAS_K_DOT: tl.constexpr,
    HAS_V_DOT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_ONES: tl.constexpr,
    PACKED: tl.constexpr,
    SEPARATE: tl.constexpr,
):
    HAS_S_DOT: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    DUAL: tl.constexpr = HAS_S_DOT or HAS_V_DOT
    # a free column of v's second tile holds ones, so that the row sums fall out of the product with v
    ONES: tl.constexpr = USE_ONES and BLOCK_D1 > 0 and D < BLOCK_D0 + BLOCK_D1
    # p_dot v in accumulators of its own, which the scale of s_dot multiplies once, at the end
    APART: tl.constexpr = SEPARATE and HAS_S_DOT and HAS_V_DOT

    offs_m, h, b = place(M, H, BLOCK_M)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    o_ptr += (b * M * H + h) * D
    lse_ptr += (b * H + h) * M

    # [BLOCK_M, D]
    q = load_tiles(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if HAS_Q_DOT:
        q_dot_ptr += (b * stride_q_dot_b + h * stride_q_dot_h) * VEC
        q_dot = load_tiles(q_dot_ptr, STRIDE_Q_DOT_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if HAS_K_DOT:
        k_dot_ptr += (b * stride_k_dot_b + h * stride_k_dot_h) * VEC
    if HAS_V_DOT:
        v_dot_ptr += (b * stride_v_dot_b + h * stride_v_dot_h) * VEC

    # [BLOCK_M]: the largest score so far, sum_n p and sum_n p s_dot
    # [BLOCK_M, D]: sum_n p v, sum_n p v_dot + (p s_dot) v, and the latter's second term where it is apart
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tiles(BLOCK_M, BLOCK_D0, BLOCK_D1)
    if DUAL:
        l_dot_i = tl.zeros([BLOCK_M], tl.float32)
        acc_dot = zero_tiles(BLOCK_M, BLOCK_D0, BLOCK_D1)
    if APART:
        acc_ps = zero_tiles(BLOCK_M, BLOCK_D0, BLOCK_D1)

    scale_log2 = scale * LOG2_E
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, D]
        k = load_tiles(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        # s = q k^T, s_dot = q_dot k^T + q k_dot^T, [BLOCK_M, BLOCK_N]; both are scaled where they are used
        s = dot_nt(q, k, PRECISION)
        if HAS_Q_DOT:
            s_dot = dot_nt(q_dot, k, PRECISION)
        if HAS_K_DOT:
            k_dot = load_tiles(k_dot_ptr, STRIDE_K_DOT_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
            s_dot = dot_nt(q, k_dot, PRECISION, s_dot if HAS_Q_DOT else None)
        if not EVEN_N:
            s = tl.where(offs_n[None, :] < N, s, float("-inf"))

        # every block has a column below N, so m_new is finite and alpha of the first block is exp2(-inf) = 0
        # [BLOCK_M]
        m_new = tl.maximum(m_i, tl.max(s, 1))
        alpha = tl.exp2((m_i - m_new) * scale_log2)
        # p = exp(scale (s - m)), [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None])
        m_i = m_new

        # [BLOCK_N, D]
        v = load_tiles(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        if ONES:
            v = (v[0], tl.where(BLOCK_D0 + tl.arange(0, BLOCK_D1)[None, :] == D, 1.0, v[1]).to(v[0].dtype))
        else:
            l_i = l_i * alpha + tl.sum(p, 1)
        p_r = p.to(v[0].dtype)
        # o l = sum_n p v, [BLOCK_M, D]
        acc = dot(p_r, v, acc, PRECISION, alpha[:, None])

        # o_dot l + o l_dot = sum_n p v_dot + (p s_dot) v, [BLOCK_M, D]
        if DUAL:
            acc_dot = times(acc_dot, alpha[:, None])
        if HAS_V_DOT:
            v_dot = load_tiles(v_dot_ptr, STRIDE_V_DOT_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
            acc_dot = dot(p_r, v_dot, acc_dot, PRECISION)
        if HAS_S_DOT:
            # the row sum is of the rounded products that the matrix product sees: a shift of v cancels
            # [BLOCK_M, BLOCK_N]
            ps_dot = rounded(p * s_dot if APART else p * (s_dot * scale), v[0].dtype, PACKED)
            if not ONES:
                l_dot_i = l_dot_i * alpha + tl.sum(ps_dot, 1)
            ps_dot = ps_dot.to(v[0].dtype)
            if APART:
                acc_ps = dot(ps_dot, v, acc_ps, PRECISION, alpha[:, None])
            else:
                acc_dot = dot(ps_dot, v, acc_dot, PRECISION)

    if APART:
        l_dot_i *= scale
        acc_dot = add_rows(acc_dot, times(acc_ps, scale))
    if ONES:
        is_one = BLOCK_D0 + tl.arange(0, BLOCK_D1)[None, :] == D
        l_i = tl.sum(tl.where(is_one, acc[1], 0.0), 1)
        if DUAL:
            l_dot_i = tl.sum(tl.where(is_one, acc_dot[1], 0.0), 1)
    # o = acc / l, o_dot = (acc_dot - o l_dot) / l, [BLOCK_M, D]
    r_l = (1.0 / l_i)[:, None]
    o = times(acc, r_l)
    store_tiles(o_ptr, H * D, offs_m, o, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if DUAL:
        o_dot_ptr += (b * M * H + h) * D
        o_dot = ()
        for i in tl.static_range(len(o)):
            o_dot += ((acc_dot[i] - o[i] * l_dot_i[:, None]) * r_l,)
        store_tiles(o_dot_ptr, H * D, offs_m, o_dot, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    # lse = log(sum_n exp(scale s)), [BLOCK_M]
    lse = (m_i * scale_log2 + tl.log2(l_i)) * LN_2
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < M)
