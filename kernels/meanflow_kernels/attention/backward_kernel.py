"""Triton kernels of the primal's backward, for devices and dtypes that no library backward serves.

    p = exp(s - lse)    delta = sum_d o do    ds = p (do v^T - delta)
    dv = p^T do         dk = scale ds^T q     dq = scale ds k

One kernel a row tile of q gives dq and delta, a second a row tile of k gives dk and dv. Shapes and tiles as in
kernel.py.
"""

import triton
import triton.language as tl

from .kernel import dot_nt, load_pair, store_pair

_STRIDES = [f"stride_{x}_{dim}" for x in ("q", "k", "v", "do") for dim in "bh"]
_STRIDES += [f"stride_{x}_{dim}" for x in ("dq", "dk", "dv") for dim in "blh"]


@triton.jit(do_not_specialize=[*_STRIDES, "H", "M", "N"])
def attention_bwd_dq_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H, D)
    v_ptr,  # (B, N, H, D)
    do_ptr,  # (B, M, H, D)
    o_ptr,  # (B, M, H, D) contiguous
    lse_ptr,  # (B, H, M) fp32
    delta_ptr,  # (B, H, M) fp32, written
    dq_ptr,  # (B, M, H, D), written
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_do_b,
    stride_do_h,
    stride_dq_b,
    stride_dq_l,
    stride_dq_h,
    scale,
    H,
    M,
    N,
    STRIDE_Q_L: tl.constexpr,
    STRIDE_K_L: tl.constexpr,
    STRIDE_V_L: tl.constexpr,
    STRIDE_DO_L: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SPLIT: tl.constexpr = BLOCK_D1 > 0
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = (tl.program_id(0) // tiles_m) % H
    b = (tl.program_id(0) // tiles_m // H).to(tl.int64)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    do_ptr += (b * stride_do_b + h * stride_do_h) * VEC
    o_ptr += (b * M * H + h) * D
    dq_ptr += (b * stride_dq_b + h * stride_dq_h) * VEC

    q0, q1 = load_pair(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    do0, do1 = load_pair(do_ptr, STRIDE_DO_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    o0, o1 = load_pair(o_ptr, H * D, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if SPLIT:
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * M + offs_m, delta, mask=offs_m < M)
    lse_log2 = tl.load(lse_ptr + (b * H + h) * M + offs_m, mask=offs_m < M, other=0.0) * 1.4426950408889634

    dq0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
    if SPLIT:
        dq1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k0, k1 = load_pair(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        v0, v1 = load_pair(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        p = tl.exp2(dot_nt(q0, q1, k0, k1, SPLIT, PRECISION) * scale_log2 - lse_log2[:, None])
        if not EVEN_N:
            # a zero score beyond N may lie far above lse
            p = tl.where(offs_n[None, :] < N, p, 0.0)
        ds = (p * (dot_nt(do0, do1, v0, v1, SPLIT, PRECISION) - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if SPLIT:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    if SPLIT:
        store_pair(dq_ptr, stride_dq_l * VEC, offs_m, dq0 * scale, dq1 * scale, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    else:
        store_pair(dq_ptr, stride_dq_l * VEC, offs_m, dq0 * scale, dq0, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)


@triton.jit(do_not_specialize=[*_STRIDES, "H", "M", "N"])
def attention_bwd_dkdv_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H, D)
    v_ptr,  # (B, N, H, D)
    do_ptr,  # (B, M, H, D)
    lse_ptr,  # (B, H, M) fp32
    delta_ptr,  # (B, H, M) fp32
    dk_ptr,  # (B, N, H, D), written
    dv_ptr,  # (B, N, H, D), written
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_do_b,
    stride_do_h,
    stride_dk_b,
    stride_dk_l,
    stride_dk_h,
    stride_dv_b,
    stride_dv_l,
    stride_dv_h,
    scale,
    H,
    M,
    N,
    STRIDE_Q_L: tl.constexpr,
    STRIDE_K_L: tl.constexpr,
    STRIDE_V_L: tl.constexpr,
    STRIDE_DO_L: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SPLIT: tl.constexpr = BLOCK_D1 > 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = (tl.program_id(0) // tiles_n) % H
    b = (tl.program_id(0) // tiles_n // H).to(tl.int64)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    do_ptr += (b * stride_do_b + h * stride_do_h) * VEC
    dk_ptr += (b * stride_dk_b + h * stride_dk_h) * VEC
    dv_ptr += (b * stride_dv_b + h * stride_dv_h) * VEC
    lse_ptr += (b * H + h) * M
    delta_ptr += (b * H + h) * M

    k0, k1 = load_pair(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    v0, v1 = load_pair(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    dk0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
    if SPLIT:
        dk1 = tl.zeros([BLOCK_N, BLOCK_D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, BLOCK_D1], tl.float32)
    scale_log2 = scale * 1.4426950408889634
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q0, q1 = load_pair(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
        do0, do1 = load_pair(do_ptr, STRIDE_DO_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
        # rows beyond M: q, do, lse and delta are zero, so p is 1 and adds nothing
        lse_log2 = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < M, other=0.0)
        # transposed tiles (BLOCK_N, BLOCK_M); rows beyond N are never stored
        p = tl.exp2(dot_nt(k0, k1, q0, q1, SPLIT, PRECISION) * scale_log2 - lse_log2[None, :])
        p_r = p.to(do0.dtype)
        dv0 = tl.dot(p_r, do0, dv0, input_precision=PRECISION)
        if SPLIT:
            dv1 = tl.dot(p_r, do1, dv1, input_precision=PRECISION)
        ds = (p * (dot_nt(v0, v1, do0, do1, SPLIT, PRECISION) - delta[None, :])).to(q0.dtype)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if SPLIT:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    if SPLIT:
        store_pair(dk_ptr, stride_dk_l * VEC, offs_n, dk0 * scale, dk1 * scale, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        store_pair(dv_ptr, stride_dv_l * VEC, offs_n, dv0, dv1, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    else:
        store_pair(dk_ptr, stride_dk_l * VEC, offs_n, dk0 * scale, dk0, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        store_pair(dv_ptr, stride_dv_l * VEC, offs_n, dv0, dv0, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
