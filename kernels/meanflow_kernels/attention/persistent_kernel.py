"""Gluon kernel of attention's forward on sm_90 for (primal, tangent).

It is persistent and specialised by warps. A program stays on its multiprocessor and takes one item after the other: 128
rows of q of a head. Two groups of warps have 64 rows each; a third only loads. It fills a ring of STAGES tiles of k and
v and of their tangents, and q and q_dot of the next item while the two still work at the last. So the copies of an item
hide behind the arithmetic of another, one group's exponentials behind the other's products, and 128 rows share what
crosses L2.

Letters, column tiles and the arithmetic are those of kernel.py, without its column of ones. Here a matrix [64, D] is a
tuple of [64, 64] and, where D > 64, [64, 16], and a slot of a ring in shared memory is a tuple of such tiles.

Barriers. A ring's slot has two: *full*, on which the 128 threads that load arrive when their copies are in, and
*empty*, on which each group that reads arrives when it has read. The i-th use of a slot waits for phase i of full and
phase i - 1 of empty, which a new barrier counts as over. All three walk the same items and the same tiles, whatever
their number, so each phase has its arrivals, and a program without items waits for nothing.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..constants import LN_2, LOG2_E
from .kernel import STRIDES, rounded

ROWS: gl.constexpr = gl.constexpr(64)
"""Rows of a tile: of q of a group of warps, of k and v of a step."""
READERS: gl.constexpr = gl.constexpr(2)
"""Groups of warps that multiply; with the one that loads they are of four warps each."""
REGISTERS: gl.constexpr = gl.constexpr((216, 72))
"""Registers a thread of a reader and of the loader: three groups share the 64 K of a multiprocessor."""


@gluon.constexpr_function
def _read_layout(width):
    # 16 bytes a thread, four warps
    return gl.BlockedLayout([1, 8], [32 // (width // 8), width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _sum_layout(width):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.constexpr_function
def _operand_layout(width):
    return gl.DotOperandLayout(0, _sum_layout(width), 2)


@gluon.constexpr_function
def _row_layout(width):
    return gl.SliceLayout(1, _sum_layout(width))


@gluon.jit
def _ring(SLOTS: gl.constexpr, dtype: gl.constexpr, D: gl.constexpr):
    """SLOTS slots of [ROWS, D]."""
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = (gl.allocate_shared_memory(dtype, [SLOTS, ROWS, 64], wide),)
    if D > 64:
        narrow: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
        tiles += (gl.allocate_shared_memory(dtype, [SLOTS, ROWS, 16], narrow),)
    return tiles


@gluon.jit
def _barriers(SLOTS: gl.constexpr, COUNT: gl.constexpr):
    """A barrier of COUNT arrivals for each slot."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def _slot(ring, i):
    tiles = ()
    for t in gl.static_range(len(ring)):
        tiles += (ring[t].index(i),)
    return tiles


@gluon.jit
def _offsets(W: gl.constexpr, FIRST: gl.constexpr):
    # rows [ROWS, 1] and columns [1, W] of a column tile
    L: gl.constexpr = _read_layout(W)
    offs_l = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))[:, None]
    return offs_l, FIRST + gl.arange(0, W, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def _copy(ring, i, ptr, STRIDE: gl.constexpr, rows, D: gl.constexpr, EVEN: gl.constexpr):
    # the first of the rows from ptr on into slot i; what lies beyond them, and columns beyond D, are zero
    for t in gl.static_range(len(ring)):
        offs_l, offs_d = _offsets(ring[t].shape[2], 64 * t)
        ptrs = ptr + offs_l * STRIDE + offs_d
        if EVEN and D >= 64 * t + ring[t].shape[2]:
            async_copy.async_copy_global_to_shared(ring[t].index(i), ptrs)
        else:
            mask = (offs_l < (ROWS if EVEN else rows)) & (offs_d < D)
            async_copy.async_copy_global_to_shared(ring[t].index(i), ptrs, mask=mask)


@gluon.jit
def _store(ptr, x, stride_l, rows, D: gl.constexpr, EVEN: gl.constexpr):
    # the first rows of x [ROWS, D], rounded to the dtype of what ptr points to
    for t in gl.static_range(len(x)):
        offs_l, offs_d = _offsets(x[t].shape[1], 64 * t)
        ptrs = ptr + offs_l * stride_l + offs_d
        y = gl.convert_layout(x[t].to(ptr.dtype.element_ty), _read_layout(x[t].shape[1]))
        if EVEN and D >= 64 * t + x[t].shape[1]:
            gl.store(ptrs, y)
        else:
            gl.store(ptrs, y, mask=(offs_l < (ROWS if EVEN else rows)) & (offs_d < D))


@gluon.jit
def _zeros(D: gl.constexpr):
    """[ROWS, D] of zeros, fp32, as products are summed."""
    tiles = (gl.zeros([ROWS, 64], gl.float32, _sum_layout(64)),)
    if D > 64:
        tiles += (gl.zeros([ROWS, 16], gl.float32, _sum_layout(16)),)
    return tiles


@gluon.jit
def _dot_nt(a, b, acc, KEEP: gl.constexpr):
    """a b^T [ROWS, ROWS], begun; plus acc where KEEP. a and b are slots."""
    for t in gl.static_range(len(a)):
        acc = warpgroup_mma(a[t], b[t].permute((1, 0)), acc, use_acc=KEEP or t > 0, is_async=True)
    return acc


@gluon.jit
def _dot(p, v, acc):
    """acc + p v [ROWS, D], begun; p [ROWS, ROWS] in registers, v a slot."""
    tiles = ()
    for t in gl.static_range(len(v)):
        a = gl.convert_layout(p, _operand_layout(v[t].shape[1]))
        tiles += (warpgroup_mma(a, v[t], acc[t], is_async=True),)
    return tiles


@gluon.jit
def _times(x, factor):
    """x [ROWS, D] times factor [ROWS]."""
    tiles = ()
    for t in gl.static_range(len(x)):
        tiles += (x[t] * gl.convert_layout(factor, _row_layout(x[t].shape[1])).expand_dims(1),)
    return tiles


@gluon.jit
def _place(item, H, M):
    """An item's first row, its head and its sample. A head's items are neighbours: they share L2."""
    tiles = gl.cdiv(M, READERS * ROWS)
    return (item % tiles) * (READERS * ROWS), (item // tiles) % H, (item // tiles // H).to(gl.int64)


@gluon.jit
def _wait_full(full, use, SLOTS: gl.constexpr):
    mbarrier.wait(full.index(use % SLOTS), (use // SLOTS) & 1)
    # cp.async writes through another proxy than the one by which wgmma reads
    fence_async_shared()


@gluon.jit
def _wait_empty(empty, use, SLOTS: gl.constexpr):
    mbarrier.wait(empty.index(use % SLOTS), ((use // SLOTS) & 1) ^ 1)


@gluon.jit
def _load(inputs, strides, rings, full, empty, sizes, L: gl.constexpr, FORM: gl.constexpr):
    """The warps that load; ``strides`` of batch and head are in vectors, those of tokens, L, in elements."""
    D: gl.constexpr = FORM[0]
    STAGES: gl.constexpr = FORM[1]
    EVEN_M: gl.constexpr = FORM[2]
    EVEN_N: gl.constexpr = FORM[3]
    q_ptr, k_ptr, v_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr = inputs
    H, M, N, items = sizes
    q_ring, kv_ring = rings
    q_full, k_full, v_full = full
    q_empty, kv_empty = empty
    turn = 0
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        start_m, h, b = _place(item, H, M)
        q = q_ptr + (b * strides[0] + h * strides[1]) * 8
        k = k_ptr + (b * strides[2] + h * strides[3]) * 8
        v = v_ptr + (b * strides[4] + h * strides[5]) * 8
        q_dot = q_dot_ptr + (b * strides[6] + h * strides[7]) * 8
        k_dot = k_dot_ptr + (b * strides[8] + h * strides[9]) * 8
        v_dot = v_dot_ptr + (b * strides[10] + h * strides[11]) * 8
        _wait_empty(q_empty, turn, 2)
        for part in gl.static_range(READERS):
            at = (turn % 2 * READERS + part) * 2
            row = start_m + part * ROWS
            _copy(q_ring, at, q + row * L[0], L[0], M - row, D, EVEN_M)
            _copy(q_ring, at + 1, q_dot + row * L[3], L[3], M - row, D, EVEN_M)
        async_copy.mbarrier_arrive(q_full.index(turn % 2), increment_count=False)
        for n in range(0, N, ROWS):
            stage = step % STAGES
            at = stage * 4
            _wait_empty(kv_empty, step, STAGES)
            _copy(kv_ring, at, k + n * L[1], L[1], N - n, D, EVEN_N)
            _copy(kv_ring, at + 1, k_dot + n * L[4], L[4], N - n, D, EVEN_N)
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            _copy(kv_ring, at + 2, v + n * L[2], L[2], N - n, D, EVEN_N)
            _copy(kv_ring, at + 3, v_dot + n * L[5], L[5], N - n, D, EVEN_N)
            async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
            step += 1
        turn += 1


@gluon.jit
def _attend(outputs, scale, rings, full, empty, sizes, PART: gl.constexpr, FORM: gl.constexpr):
    """The warps that multiply rows PART * ROWS and on of every item."""
    D: gl.constexpr = FORM[0]
    STAGES: gl.constexpr = FORM[1]
    EVEN_M: gl.constexpr = FORM[2]
    EVEN_N: gl.constexpr = FORM[3]
    o_ptr, o_dot_ptr, lse_ptr = outputs
    H, M, N, items = sizes
    q_ring, kv_ring = rings
    q_full, k_full, v_full = full
    q_empty, kv_empty = empty
    TILES: gl.constexpr = len(q_ring)
    R: gl.constexpr = _row_layout(64)
    dtype: gl.constexpr = o_ptr.dtype.element_ty
    unset = gl.zeros([ROWS, ROWS], gl.float32, _sum_layout(64))
    scale_log2 = scale * LOG2_E
    turn = 0
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        # sums as in kernel.py: [ROWS] and [ROWS, D]
        m_i = gl.full([ROWS], float("-inf"), gl.float32, R)
        l_i = gl.zeros([ROWS], gl.float32, R)
        acc = _zeros(D)
        l_dot_i = gl.zeros([ROWS], gl.float32, R)
        acc_dot = _zeros(D)
        _wait_full(q_full, turn, 2)
        at_q = (turn % 2 * READERS + PART) * 2
        q = _slot(q_ring, at_q)
        for n in range(0, N, ROWS):
            stage = step % STAGES
            at = stage * 4
            _wait_full(k_full, step, STAGES)
            k = _slot(kv_ring, at)
            # [ROWS, ROWS]; s_dot is multiplied while p is made of s
            s = _dot_nt(q, k, unset, False)
            s_dot = _dot_nt(_slot(q_ring, at_q + 1), k, unset, False)
            s_dot = _dot_nt(q, _slot(kv_ring, at + 1), s_dot, True)
            s = warpgroup_mma_wait(2 * TILES, deps=[s])
            if not EVEN_N:
                offs_n = n + gl.arange(0, ROWS, layout=gl.SliceLayout(0, _sum_layout(64)))
                s = gl.where(offs_n[None, :] < N, s, float("-inf"))
            m_new = gl.maximum(m_i, gl.max(s, 1))
            alpha = gl.exp2((m_i - m_new) * scale_log2)
            p = gl.exp2(s * scale_log2 - (m_new * scale_log2).expand_dims(1))
            m_i = m_new
            l_i = l_i * alpha + gl.sum(p, 1)
            p_r = p.to(dtype)
            acc = _times(acc, alpha)
            acc_dot = _times(acc_dot, alpha)
            s_dot = warpgroup_mma_wait(0, deps=[s_dot])
            _wait_full(v_full, step, STAGES)
            v = _slot(kv_ring, at + 2)
            acc = _dot(p_r, v, acc)
            # p v and p v_dot are multiplied while ps_dot is made
            acc_dot = _dot(p_r, _slot(kv_ring, at + 3), acc_dot)
            ps_dot = rounded(p * (s_dot * scale), dtype, True)
            l_dot_i = l_dot_i * alpha + gl.sum(ps_dot, 1)
            acc_dot = _dot(ps_dot.to(dtype), v, acc_dot)
            both = warpgroup_mma_wait(0, deps=acc + acc_dot)
            acc = both[:TILES]
            acc_dot = both[TILES:]
            mbarrier.arrive(kv_empty.index(stage), count=1)
            step += 1
        mbarrier.arrive(q_empty.index(turn % 2), count=1)
        turn += 1

        start_m, h, b = _place(item, H, M)
        row = start_m + PART * ROWS
        r_l = 1.0 / l_i
        o = _times(acc, r_l)
        start_o = ((b * M + row) * H + h) * D
        _store(o_ptr + start_o, o, H * D, M - row, D, EVEN_M)
        shift = _times(o, l_dot_i)
        o_dot = ()
        for t in gl.static_range(TILES):
            o_dot += (acc_dot[t] - shift[t],)
        _store(o_dot_ptr + start_o, _times(o_dot, r_l), H * D, M - row, D, EVEN_M)
        offs = gl.arange(0, ROWS, layout=R)
        lse = (m_i * scale_log2 + gl.log2(l_i)) * LN_2
        gl.store(lse_ptr + (b * H + h) * M + row + offs, lse, mask=offs < M - row)


@gluon.jit(do_not_specialize=[*STRIDES, "H", "M", "N", "items"])
def attention_persistent_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H, D)
    v_ptr,  # (B, N, H, D)
    q_dot_ptr,  # like their primals
    k_dot_ptr,
    v_dot_ptr,
    o_ptr,  # (B, M, H, D) contiguous
    o_dot_ptr,  # (B, M, H, D) contiguous
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
    items,
    STRIDE_Q_L: gl.constexpr,
    STRIDE_K_L: gl.constexpr,
    STRIDE_V_L: gl.constexpr,
    STRIDE_Q_DOT_L: gl.constexpr,
    STRIDE_K_DOT_L: gl.constexpr,
    STRIDE_V_DOT_L: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    EVEN_M: gl.constexpr,
    EVEN_N: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    # q and q_dot of each group, twice; k, k_dot, v and v_dot of each stage
    rings = (_ring(4 * READERS, dtype, D), _ring(4 * STAGES, dtype, D))
    full = (_barriers(2, 128), _barriers(STAGES, 128), _barriers(STAGES, 128))
    empty = (_barriers(2, READERS), _barriers(STAGES, READERS))
    fence_async_shared()
    sizes = (H, M, N, items)
    inputs = (q_ptr, k_ptr, v_ptr, q_dot_ptr, k_dot_ptr, v_dot_ptr)
    strides = (stride_q_b, stride_q_h, stride_k_b, stride_k_h, stride_v_b, stride_v_h)
    strides += (stride_q_dot_b, stride_q_dot_h, stride_k_dot_b, stride_k_dot_h, stride_v_dot_b, stride_v_dot_h)
    L: gl.constexpr = (STRIDE_Q_L, STRIDE_K_L, STRIDE_V_L, STRIDE_Q_DOT_L, STRIDE_K_DOT_L, STRIDE_V_DOT_L)
    outputs = (o_ptr, o_dot_ptr, lse_ptr)
    FORM: gl.constexpr = (D, STAGES, EVEN_M, EVEN_N)
    gl.warp_specialize(
        [
            (_attend, (outputs, scale, rings, full, empty, sizes, 0, FORM)),
            (_attend, (outputs, scale, rings, full, empty, sizes, 1, FORM)),
            (_load, (inputs, strides, rings, full, empty, sizes, L, FORM)),
        ],
        [4, 4],
        REGISTERS,
    )
