"""From tensors to launches: alignment, column tiles and strides, the same for a run and a cross-compilation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..launch import CompileCase, Launch, strides
from ..tiling import ceil_div, multiprocessors, next_power_of_two
from .config import (
    BIAS_SUMS,
    PACK,
    AttentionConfig,
    PersistentConfig,
    backward_configs,
    dual_config,
    plain_config,
)

_SIXTEEN_BYTES = 16


def aligned(x: Tensor) -> Tensor:
    """``x`` (B, L, H, D) itself where the kernels can read it with 16-byte loads, else a contiguous copy.

    That needs contiguous columns, and the start and all other strides on 16-byte boundaries: true of every slice of a
    packed projection whose head dim is a multiple of 8.
    """
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in strides(x, 3)))
    fits = (x.shape[-1] == 1 or x.stride(-1) == 1) and all(start % _SIXTEEN_BYTES == 0 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def column_tiles(head_dim: int) -> tuple[int, int]:
    """Widths of the column tiles: (64, 0) for 64, (64, 16) for 72, (64, 32) for 96; (128, 0) where no split saves."""
    whole = next_power_of_two(head_dim)
    first = 1 << (head_dim.bit_length() - 1)
    if first == head_dim:
        return head_dim, 0
    rest = max(16, next_power_of_two(head_dim - first))
    return (whole, 0) if first + rest >= whole else (first, rest)


def _vectors(x: Tensor | None) -> tuple[int, ...]:
    """Batch, token and head stride in vectors."""
    return tuple(stride // (_SIXTEEN_BYTES // x.element_size()) if stride else 0 for stride in strides(x, 3))


def _layout(tensors: dict[str, Tensor | None]) -> tuple[dict[str, Tensor | int | None], dict[str, int]]:
    """Pointers with batch and head strides in vectors (run-time arguments), and token strides (constants)."""
    args, constants = {}, {}
    for name, x in tensors.items():
        args[f"{name}_ptr"] = x
        args[f"stride_{name}_b"], length, args[f"stride_{name}_h"] = _vectors(x)
        constants[f"STRIDE_{name.upper()}_L"] = 0 if x is None else length * (_SIXTEEN_BYTES // x.element_size())
    return args, constants


def _written(tensors: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """Pointers with all strides in vectors, as run-time arguments.

    A token stride that is a constant is often that of what is read too. The compiler then computes no offset twice, but
    keeps those of the loads in registers until the stores, and spills.
    """
    args = {}
    for name, x in tensors.items():
        args[f"{name}_ptr"] = x
        args |= {f"stride_{name}_{dim}": stride for dim, stride in zip("blh", _vectors(x), strict=True)}
    return args


def _shape_constants(q: Tensor, k: Tensor, config: AttentionConfig) -> dict[str, object]:
    """The constants all kernels share."""
    block_d0, block_d1 = column_tiles(q.shape[-1])
    return {
        "D": q.shape[-1],
        "BLOCK_D0": block_d0,
        "BLOCK_D1": block_d1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EVEN_M": q.shape[1] % config.block_m == 0,
        "EVEN_N": k.shape[1] % config.block_n == 0,
        "VEC": _SIXTEEN_BYTES // q.element_size(),
        # ieee for fp32: tl.dot would round its operands to TF32; 16-bit operands have one precision
        "PRECISION": "ieee",
    }


def forward_launch(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor, Tensor | None, Tensor],
    scale: float,
    config: AttentionConfig | PersistentConfig,
) -> Launch:
    """The forward of :func:`aligned` primals and tangents into (o, o_dot, lse); plain where all tangents are None."""
    (q, k, v), (q_dot, k_dot, v_dot), (o, o_dot, lse) = primals, tangents, outputs
    args, constants = _layout({"q": q, "k": k, "v": v, "q_dot": q_dot, "k_dot": k_dot, "v_dot": v_dot})
    batch, m, heads, _ = q.shape
    args |= {"o_ptr": o, "o_dot_ptr": o_dot, "lse_ptr": lse, "scale": scale, "H": heads, "M": m, "N": k.shape[1]}
    if isinstance(config, PersistentConfig):
        return _persistent_launch(q, args, constants, config)
    from .kernel import attention_kernel

    constants |= {"HAS_Q_DOT": q_dot is not None, "HAS_K_DOT": k_dot is not None, "HAS_V_DOT": v_dot is not None}
    constants |= _shape_constants(q, k, config)
    constants |= {"USE_ONES": config.ones, "PACKED": config.packed, "SEPARATE": config.separate}
    grid = (ceil_div(m, config.block_m) * batch * heads,)
    return Launch(attention_kernel, grid, args, constants, config.num_warps, config.num_stages)


def _persistent_launch(q: Tensor, args: dict, constants: dict, config: PersistentConfig) -> Launch:
    from .persistent_kernel import READERS, ROWS, attention_persistent_kernel

    (batch, m, heads, head_dim), rows = q.shape, READERS.value * ROWS.value
    items = ceil_div(m, rows) * batch * heads
    constants |= {"D": head_dim, "STAGES": config.num_stages}
    constants |= {"EVEN_M": m % rows == 0, "EVEN_N": args["N"] % ROWS.value == 0}
    grid = (min(items, multiprocessors(q.device)),)
    # four warps a group; Triton adds the other groups' to the first's
    return Launch(attention_persistent_kernel, grid, args | {"items": items}, constants, 4, config.num_stages)


def backward_launches(
    do: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    delta: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    scale: float,
    configs: tuple[AttentionConfig, AttentionConfig],
    dbias: Tensor | None = None,
) -> Iterator[Launch]:
    """dq and delta, then dk and dv, of :func:`aligned` ``do`` and ``saved`` = (q, k, v, o, lse) with contiguous o.

    The gradients are written by their strides, on 16-byte boundaries as what is read. Into ``dbias`` (3 H D,), where it
    is given, a third launch writes the gradient of a bias that q, k and v, equally long, contain.
    """
    from ..partials import sum_partials
    from .backward_kernel import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel

    (q, k, v, o, lse), (dq, dk, dv) = saved, gradients
    read, strides = _layout({"q": q, "k": k, "v": v, "do": do})
    batch, m, heads, _ = q.shape
    n = k.shape[1]
    read |= {"lse_ptr": lse, "delta_ptr": delta, "scale": scale, "H": heads, "M": m, "N": n}

    config = configs[0]
    grid = (ceil_div(m, config.block_m) * batch * heads,)
    partial = None if dbias is None else lse.new_empty((1, ceil_div(m, config.block_m) * batch, len(dbias)))
    args = read | {"o_ptr": o, "partial_ptr": partial} | _written({"dq": dq})
    constants = strides | _shape_constants(q, k, config)
    yield Launch(attention_bwd_dq_kernel, grid, args, constants, config.num_warps, config.num_stages, scratch=partial)

    config = configs[1]
    grid = (ceil_div(n, config.block_n) * batch * heads,)
    args = read | _written({"dk": dk, "dv": dv})
    constants = strides | _shape_constants(q, k, config)
    yield Launch(attention_bwd_dkdv_kernel, grid, args, constants, config.num_warps, config.num_stages)

    if partial is not None:
        yield sum_partials(partial, [dbias[None]], BIAS_SUMS)


def pack_launches(gradients: tuple[Tensor, Tensor, Tensor], dqkv: Tensor, dbias: Tensor | None) -> Iterator[Launch]:
    """Contiguous dq, dk and dv (B, L, H, D) side by side into dqkv (B, L, 3, H, D).

    A second launch writes their sums over samples and tokens into dbias (3 H D,), where it is given.
    """
    from ..partials import sum_partials
    from .backward_kernel import attention_bwd_pack_kernel

    dq, dk, dv = gradients
    batch, length, heads, head_dim = dq.shape
    rows, width = batch * length, heads * head_dim
    strips = 3 * ceil_div(width, PACK.block_c)
    rows_per_chunk = PACK.rows_per_program(strips, rows, dq.device)
    chunks = ceil_div(rows, rows_per_chunk)
    partial = None if dbias is None else dq.new_empty((1, chunks, 3 * width), dtype=torch.float32)
    args = {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "dqkv_ptr": dqkv, "partial_ptr": partial}
    args |= {"rows": rows, "rows_per_chunk": rows_per_chunk}
    constants = {"C": width, "BLOCK_R": PACK.block_r, "BLOCK_C": PACK.block_c}
    yield Launch(attention_bwd_pack_kernel, (strips * chunks,), args, constants, PACK.num_warps, 1, scratch=partial)
    if partial is not None:
        yield sum_partials(partial, [dbias[None]], BIAS_SUMS)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every shipped config as its launches, on packed (B, L, 3, H, D) meta tensors.

    Odd lengths ("ragged") need all that even ones do and masks besides, so most cases are ragged; the head dims of DiT
    have both, and 64 tokens, whose configs are others. Architectures that share the common table are compiled at its
    extremes only.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    if arch not in (80, 90):
        cases = [case for head_dim in (64, 72, 128) for case in _head_dim_cases(arch, bf16, head_dim, 1023)]
        return cases + _pack_cases()
    rows = [(bf16, d, 1023) for d in (32, 64, 72, 96, 128)] + [
        (bf16, d, length) for d in (64, 72) for length in (1024, 64)
    ]
    rows += [(fp32, d, 1023) for d in (40, 48, 64, 72, 80, 128)]
    cases = [case for row in rows for case in _head_dim_cases(arch, *row)]
    # no length is a constant: what has the same label is the same kernel
    different = {(case.op, case.label, case.dtype, case.width): case for case in cases}
    return [*different.values(), *_pack_cases()]


def _pack_cases() -> list[CompileCase]:
    """What packs a library's gradients, as XL/2 has them, and what adds up the partial sums of either backward."""
    qkv = torch.empty(32, 256, 3, 16, 72, dtype=torch.bfloat16, device="meta")
    q, k, v = (x.contiguous() for x in qkv.unbind(2))
    ops = {"attention_bwd pack": PACK, "attention_bwd sums": BIAS_SUMS}
    launches = pack_launches((q, k, v), qkv, qkv[0, 0].flatten())
    return [
        CompileCase(op, f"{tile.block_r}x{tile.block_c} w{tile.num_warps}", qkv.dtype, q.shape[-1], launch)
        for (op, tile), launch in zip(ops.items(), launches, strict=True)
    ]


def _head_dim_cases(arch: int, dtype: torch.dtype, head_dim: int, length: int) -> list[CompileCase]:
    """The dual and plain forwards and both backward kernels of one head dim."""
    qkv = torch.empty(2, length, 3, 4, head_dim, dtype=dtype, device="meta")
    q, k, v = qkv.unbind(2)
    o, lse = q.new_empty(q.shape), q.new_empty((2, 4, length), dtype=torch.float32)

    def case(op, config, launch):
        even = launch.constexprs["EVEN_M"] and launch.constexprs["EVEN_N"]
        return CompileCase(op, f"{config}{'' if even else ' ragged'}", dtype, head_dim, launch)

    duals = dict.fromkeys(dual_config(arch, dtype, head_dim, length, every=every) for every in (True, False))
    plain = plain_config(arch, dtype, head_dim, length)
    configs = backward_configs(arch, dtype, head_dim, length)
    # with a bias: all that a launch without one needs, and the sums besides
    gradients, dbias = torch.empty_like(qkv).unbind(2), qkv.new_empty(3 * q[0, 0].numel())
    dq, dkdv, _ = backward_launches(o, (q, k, v, o, lse), lse, gradients, 1.0, configs, dbias)
    return [
        *(case("attention_jvp", dual, forward_launch((q, k, v), (q, k, v), (o, o, lse), 1.0, dual)) for dual in duals),
        case("attention", plain, forward_launch((q, k, v), (None, None, None), (o, None, lse), 1.0, plain)),
        case("attention_bwd_dq", configs[0], dq),
        case("attention_bwd_dkdv", configs[1], dkdv),
    ]
