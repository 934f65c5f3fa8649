"""Triton kernels of attention: one forward for the primal alone and for (primal, tangent), and the primal's backward.

B batch, H heads, M and N lengths of q and of k and v, D head dim.

A head dim is one or two column tiles: D <= BLOCK_D0, or D = BLOCK_D0 + a remainder in BLOCK_D1 (72 = 64 + 8 of 16), so
that no head dim is padded to the next power of two where a split is narrower. Batch and head strides arrive in vectors
of VEC elements (16 bytes): multiplied back by a constant they keep their divisibility, and every load is 16 bytes wide
whatever the head dim. Token strides are constants, in elements: as run-time values the addresses of four pipelined
tiles take 57 registers more (hd 64, 64x64 tiles, sm_90).

The choices of a launch config (config.py) are constants too: ONES, PACKED and SEPARATE.
"""

import triton
import triton.language as tl

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
def load_pair(ptr, stride_l, offs_l, L, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_L: tl.constexpr):
    # both column tiles; the second is the first, unused, where there is none
    tile0 = _load(ptr, stride_l, offs_l, tl.arange(0, D0), L, D, EVEN_L, D >= D0)
    if D1 > 0:
        tile1 = _load(ptr, stride_l, offs_l, D0 + tl.arange(0, D1), L, D, EVEN_L, D == D0 + D1)
    else:
        tile1 = tile0
    return tile0, tile1


@triton.jit
def _store(ptr, stride_l, offs_l, offs_d, x, L, D: tl.constexpr, EVEN_L: tl.constexpr, EVEN_D: tl.constexpr):
    ptrs = ptr + offs_l[:, None] * stride_l + offs_d[None, :]
    x = x.to(ptr.dtype.element_ty)
    if EVEN_L and EVEN_D:
        tl.store(ptrs, x)
    else:
        tl.store(ptrs, x, mask=(offs_l[:, None] < L) & (offs_d[None, :] < D))


@triton.jit
def store_pair(
    ptr, stride_l, offs_l, x0, x1, L, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_L: tl.constexpr
):
    _store(ptr, stride_l, offs_l, tl.arange(0, D0), x0, L, D, EVEN_L, D >= D0)
    if D1 > 0:
        _store(ptr, stride_l, offs_l, D0 + tl.arange(0, D1), x1, L, D, EVEN_L, D == D0 + D1)


@triton.jit
def dot_nt(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    # a b^T over both column tiles
    c = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SPLIT:
        c = tl.dot(a1, tl.trans(b1), c, input_precision=PRECISION)
    return c


@triton.jit
def _rounded(x, dtype: tl.constexpr, PACKED: tl.constexpr):
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


_STRIDES = [f"stride_{x}_{dim}" for x in ("q", "k", "v", "q_dot", "k_dot", "v_dot") for dim in "bh"]


# no integer is specialised: one binary serves every batch size, head count and length of a config
@triton.jit(do_not_specialize=[*_STRIDES, "H", "M", "N"])
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
    SPLIT: tl.constexpr = BLOCK_D1 > 0
    HAS_S_DOT: tl.constexpr = HAS_Q_DOT or HAS_K_DOT
    DUAL: tl.constexpr = HAS_S_DOT or HAS_V_DOT
    # a free column of v's second tile holds ones, so that the row sums fall out of the product with v
    ONES: tl.constexpr = USE_ONES and SPLIT and D < BLOCK_D0 + BLOCK_D1
    # p_dot v in accumulators of its own, which the scale of s_dot multiplies once, at the end
    APART: tl.constexpr = SEPARATE and HAS_S_DOT and HAS_V_DOT

    # the row tiles of one head are neighbours in the grid: they share k and v in L2
    tiles_m = tl.cdiv(M, BLOCK_M)
    start_m = (tl.program_id(0) % tiles_m) * BLOCK_M
    h = (tl.program_id(0) // tiles_m) % H
    b = (tl.program_id(0) // tiles_m // H).to(tl.int64)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    o_ptr += (b * M * H + h) * D
    lse_ptr += (b * H + h) * M

    offs_m = start_m + tl.arange(0, BLOCK_M)
    q0, q1 = load_pair(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if HAS_Q_DOT:
        q_dot_ptr += (b * stride_q_dot_b + h * stride_q_dot_h) * VEC
        q_dot0, q_dot1 = load_pair(q_dot_ptr, STRIDE_Q_DOT_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if HAS_K_DOT:
        k_dot_ptr += (b * stride_k_dot_b + h * stride_k_dot_h) * VEC
    if HAS_V_DOT:
        v_dot_ptr += (b * stride_v_dot_b + h * stride_v_dot_h) * VEC

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
    if SPLIT:
        acc1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)
    if DUAL:
        l_dot_i = tl.zeros([BLOCK_M], tl.float32)
        acc_dot0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
        if SPLIT:
            acc_dot1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)
    if APART:
        acc_ps0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
        if SPLIT:
            acc_ps1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)

    scale_log2 = scale * 1.4426950408889634
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # s = q k^T, s_dot = q_dot k^T + q k_dot^T; both are scaled where they are used
        k0, k1 = load_pair(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        s = dot_nt(q0, q1, k0, k1, SPLIT, PRECISION)
        if HAS_Q_DOT:
            s_dot = dot_nt(q_dot0, q_dot1, k0, k1, SPLIT, PRECISION)
        if HAS_K_DOT:
            k_dot0, k_dot1 = load_pair(k_dot_ptr, STRIDE_K_DOT_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
            if HAS_Q_DOT:
                s_dot = tl.dot(q0, tl.trans(k_dot0), s_dot, input_precision=PRECISION)
                if SPLIT:
                    s_dot = tl.dot(q1, tl.trans(k_dot1), s_dot, input_precision=PRECISION)
            else:
                s_dot = dot_nt(q0, q1, k_dot0, k_dot1, SPLIT, PRECISION)
        if not EVEN_N:
            s = tl.where(offs_n[None, :] < N, s, float("-inf"))

        # every block has a column below N, so m_new is finite and alpha of the first block is exp2(-inf) = 0
        m_new = tl.maximum(m_i, tl.max(s, 1))
        alpha = tl.exp2((m_i - m_new) * scale_log2)
        p = tl.exp2(s * scale_log2 - (m_new * scale_log2)[:, None])
        m_i = m_new

        v0, v1 = load_pair(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        if ONES:
            v1 = tl.where(BLOCK_D0 + tl.arange(0, BLOCK_D1)[None, :] == D, 1.0, v1).to(v0.dtype)
        else:
            l_i = l_i * alpha + tl.sum(p, 1)
        p_r = p.to(v0.dtype)
        acc0 = tl.dot(p_r, v0, acc0 * alpha[:, None], input_precision=PRECISION)
        if SPLIT:
            acc1 = tl.dot(p_r, v1, acc1 * alpha[:, None], input_precision=PRECISION)

        if DUAL:
            acc_dot0 = acc_dot0 * alpha[:, None]
            if SPLIT:
                acc_dot1 = acc_dot1 * alpha[:, None]
        if HAS_V_DOT:
            v_dot0, v_dot1 = load_pair(v_dot_ptr, STRIDE_V_DOT_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
            acc_dot0 = tl.dot(p_r, v_dot0, acc_dot0, input_precision=PRECISION)
            if SPLIT:
                acc_dot1 = tl.dot(p_r, v_dot1, acc_dot1, input_precision=PRECISION)
        if HAS_S_DOT:
            # the row sum is of the rounded products that the matrix product sees: a shift of v cancels
            ps_dot = _rounded(p * s_dot if APART else p * (s_dot * scale), v0.dtype, PACKED)
            if not ONES:
                l_dot_i = l_dot_i * alpha + tl.sum(ps_dot, 1)
            ps_dot = ps_dot.to(v0.dtype)
            if APART:
                acc_ps0 = tl.dot(ps_dot, v0, acc_ps0 * alpha[:, None], input_precision=PRECISION)
                if SPLIT:
                    acc_ps1 = tl.dot(ps_dot, v1, acc_ps1 * alpha[:, None], input_precision=PRECISION)
            else:
                acc_dot0 = tl.dot(ps_dot, v0, acc_dot0, input_precision=PRECISION)
                if SPLIT:
                    acc_dot1 = tl.dot(ps_dot, v1, acc_dot1, input_precision=PRECISION)

    if APART:
        l_dot_i *= scale
        acc_dot0 += acc_ps0 * scale
        if SPLIT:
            acc_dot1 += acc_ps1 * scale
    if ONES:
        is_one = BLOCK_D0 + tl.arange(0, BLOCK_D1)[None, :] == D
        l_i = tl.sum(tl.where(is_one, acc1, 0.0), 1)
        if DUAL:
            l_dot_i = tl.sum(tl.where(is_one, acc_dot1, 0.0), 1)
    # o = acc / l, o_dot = (acc_dot - o l_dot) / l
    r_l = (1.0 / l_i)[:, None]
    acc0 *= r_l
    if SPLIT:
        acc1 *= r_l
        store_pair(o_ptr, H * D, offs_m, acc0, acc1, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    else:
        store_pair(o_ptr, H * D, offs_m, acc0, acc0, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    if DUAL:
        o_dot_ptr += (b * M * H + h) * D
        acc_dot0 = (acc_dot0 - acc0 * l_dot_i[:, None]) * r_l
        if SPLIT:
            acc_dot1 = (acc_dot1 - acc1 * l_dot_i[:, None]) * r_l
            store_pair(o_dot_ptr, H * D, offs_m, acc_dot0, acc_dot1, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
        else:
            store_pair(o_dot_ptr, H * D, offs_m, acc_dot0, acc_dot0, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    lse = (m_i * scale_log2 + tl.log2(l_i)) * 0.6931471805599453
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < M)
