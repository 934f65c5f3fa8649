"""Triton kernels of the primal's backward, for devices and dtypes that no library backward serves.

    p = exp(s - lse)    delta = sum_d o do    ds = p (do v^T - delta)
    dv = p^T do         dk = scale ds^T q     dq = scale ds k

One kernel a row tile of q gives dq and delta, a second a row tile of k gives dk and dv. Shapes and tiles as in
kernel.py; the first's score tiles are [BLOCK_M, BLOCK_N], the second's [BLOCK_N, BLOCK_M].

A bias that every row of q, k and v shares has the gradients

    sum_m dq            sum_n dk = scale sum_m (sum_n ds) q = 0             sum_n dv = sum_m (sum_n p) do = sum_m do

since p adds up to 1 over n, and ds to 0: the first kernel has all of them at hand, and the second none to add.
"""

import triton
import triton.language as tl

from ..constants import LOG2_E
from ..rows.kernel import times
from .kernel import dot, dot_nt, load_tiles, place, store_tiles, zero_tiles

_STRIDES = [f"stride_{x}_{dim}" for x in ("q", "k", "v", "do") for dim in "bh"]
_STRIDES += [f"stride_{x}_{dim}" for x in ("dq", "dk", "dv") for dim in "blh"]


@triton.jit
def _softmax(a, b, scale_log2, lse_log2, PRECISION: tl.constexpr):
    """p = exp(scale a b^T - lse), of scale and lse times log2(e); lse_log2 is [rows, 1] or [1, columns]."""
    return tl.exp2(dot_nt(a, b, PRECISION) * scale_log2 - lse_log2)


@triton.jit
def _score_gradient(p, a, b, delta, PRECISION: tl.constexpr):
    """ds = p (a b^T - delta), rounded as b is; delta is [rows, 1] or [1, columns]."""
    return (p * (dot_nt(a, b, PRECISION) - delta)).to(b[0].dtype)


@triton.jit
def _store_sums(sums_ptr, x, D: tl.constexpr):
    """The sum of the rows of x [rows, D]."""
    for i in tl.static_range(len(x)):
        cols = i * x[0].shape[1] + tl.arange(0, x[i].shape[1])
        tl.store(sums_ptr + cols, tl.sum(x[i].to(tl.float32), 0), mask=cols < D)


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
    partial_ptr,  # (B tiles, 3, H, D) fp32, written: a tile's sums for the bias of q, k and v; or None
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
    offs_m, h, b = place(M, H, BLOCK_M)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    do_ptr += (b * stride_do_b + h * stride_do_h) * VEC
    o_ptr += (b * M * H + h) * D
    dq_ptr += (b * stride_dq_b + h * stride_dq_h) * VEC

    # [BLOCK_M, D]
    q = load_tiles(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    do = load_tiles(do_ptr, STRIDE_DO_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    o = load_tiles(o_ptr, H * D, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
    # delta = sum_d o do, [BLOCK_M]
    delta = tl.sum(o[0].to(tl.float32) * do[0].to(tl.float32), 1)
    if BLOCK_D1 > 0:
        delta += tl.sum(o[1].to(tl.float32) * do[1].to(tl.float32), 1)
    tl.store(delta_ptr + (b * H + h) * M + offs_m, delta, mask=offs_m < M)
    if partial_ptr is not None:
        tiles = tl.cdiv(M, BLOCK_M)
        partial_ptr += ((b * tiles + tl.program_id(0) % tiles) * 3 * H + h) * D
        _store_sums(partial_ptr + H * D, zero_tiles(1, BLOCK_D0, BLOCK_D1), D)
        _store_sums(partial_ptr + 2 * H * D, do, D)
    lse_log2 = tl.load(lse_ptr + (b * H + h) * M + offs_m, mask=offs_m < M, other=0.0) * LOG2_E

    # [BLOCK_M, D]
    dq = zero_tiles(BLOCK_M, BLOCK_D0, BLOCK_D1)
    scale_log2 = scale * LOG2_E
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        # [BLOCK_N, D]
        k = load_tiles(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        v = load_tiles(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
        # [BLOCK_M, BLOCK_N]
        p = _softmax(q, k, scale_log2, lse_log2[:, None], PRECISION)
        if not EVEN_N:
            # a zero score beyond N may lie far above lse
            p = tl.where(offs_n[None, :] < N, p, 0.0)
        ds = _score_gradient(p, do, v, delta[:, None], PRECISION)
        # dq = sum_n ds k
        dq = dot(ds, k, dq, PRECISION)
    dq = times(dq, scale)
    if partial_ptr is not None:
        # before dq is stored: behind it ptxas takes up to 16 registers more. Rows beyond M are zero, as do is
        _store_sums(partial_ptr, dq, D)
    store_tiles(dq_ptr, stride_dq_l * VEC, offs_m, dq, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)


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
    offs_n, h, b = place(N, H, BLOCK_N)
    q_ptr += (b * stride_q_b + h * stride_q_h) * VEC
    k_ptr += (b * stride_k_b + h * stride_k_h) * VEC
    v_ptr += (b * stride_v_b + h * stride_v_h) * VEC
    do_ptr += (b * stride_do_b + h * stride_do_h) * VEC
    dk_ptr += (b * stride_dk_b + h * stride_dk_h) * VEC
    dv_ptr += (b * stride_dv_b + h * stride_dv_h) * VEC
    lse_ptr += (b * H + h) * M
    delta_ptr += (b * H + h) * M

    # [BLOCK_N, D]
    k = load_tiles(k_ptr, STRIDE_K_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    v = load_tiles(v_ptr, STRIDE_V_L, offs_n, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    dk = zero_tiles(BLOCK_N, BLOCK_D0, BLOCK_D1)
    dv = zero_tiles(BLOCK_N, BLOCK_D0, BLOCK_D1)
    scale_log2 = scale * LOG2_E
    for start_m in range(0, M, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        # [BLOCK_M, D]
        q = load_tiles(q_ptr, STRIDE_Q_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
        do = load_tiles(do_ptr, STRIDE_DO_L, offs_m, M, D, BLOCK_D0, BLOCK_D1, EVEN_M)
        # rows beyond M: q, do, lse and delta are zero, so p is 1 and adds nothing
        # [BLOCK_M]
        lse_log2 = tl.load(lse_ptr + offs_m, mask=offs_m < M, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < M, other=0.0)
        # [BLOCK_N, BLOCK_M]; rows beyond N are never stored
        p = _softmax(k, q, scale_log2, lse_log2[None, :], PRECISION)
        # dv = sum_m p do
        dv = dot(p.to(do[0].dtype), do, dv, PRECISION)
        ds = _score_gradient(p, v, do, delta[None, :], PRECISION)
        # dk = sum_m ds q
        dk = dot(ds, q, dk, PRECISION)
    store_tiles(dk_ptr, stride_dk_l * VEC, offs_n, times(dk, scale), N, D, BLOCK_D0, BLOCK_D1, EVEN_N)
    store_tiles(dv_ptr, stride_dv_l * VEC, offs_n, dv, N, D, BLOCK_D0, BLOCK_D1, EVEN_N)


@triton.jit
def attention_bwd_pack_kernel(
    dq_ptr,  # (rows, C), contiguous
    dk_ptr,  # (rows, C), contiguous
    dv_ptr,  # (rows, C), contiguous
    dqkv_ptr,  # (rows, 3, C), contiguous
    partial_ptr,  # (chunks, 3, C) fp32: sums over a chunk of rows; or None
    rows,
    rows_per_chunk,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) % (3 * blocks) // blocks
    chunk = (tl.program_id(0) // (3 * blocks)).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr = dq_ptr
    if part == 1:
        x_ptr = dk_ptr
    if part == 2:
        x_ptr = dv_ptr
    first = chunk * rows_per_chunk
    end = tl.minimum(first + rows_per_chunk, rows)
    # [BLOCK_R, BLOCK_C]
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * C + cols[None, :], mask=mask, other=0.0)
        tl.store(dqkv_ptr + (row[:, None] * 3 + part) * C + cols[None, :], x, mask=mask)
        if partial_ptr is not None:
            total += x.to(tl.float32)
    if partial_ptr is not None:
        tl.store(partial_ptr + (chunk * 3 + part) * C + cols, tl.sum(total, 0), mask=cols < C)
