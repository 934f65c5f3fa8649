"""QK-norm and rotary embedding on (primal, tangent) pairs: checks, launches, registration, public functions.

The rotation is real arithmetic: one by Tensor.view(complex) has neither a gradient nor a tangent.
"""

import math

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..rows.config import RowConfig
from ..rows.launch import check_kernel_row, partial_sums, row_launch
from ..tiling import TileConfig, next_power_of_two
from .config import BACKWARD, FORWARD, SUMS
from .reference import qk_rope_ref, qk_rope_tangent_ref

_NAMES = ("qk", "q_weight", "k_weight", "cos", "sin")


@once_a_kind
def _check(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    tangents: tuple = (),
    *,
    tangent_start: int | None = None,
) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    check_shape("qk", qk, (None, None, 2, None, None), "(B, L, 2, H, D)")
    length, head_dim = qk.shape[1], qk.shape[4]
    if head_dim % 2:
        fail("qk", f"head dim {head_dim}", "an even number", "adjacent columns are rotated in pairs")
    shapes = {"q_weight": (head_dim,), "k_weight": (head_dim,)}
    shapes |= {"cos": (length, head_dim // 2), "sin": (length, head_dim // 2)}
    tensors = (qk, q_weight, k_weight, cos, sin)
    for name, tensor in zip(_NAMES[1:], tensors[1:], strict=True):
        check_shape(name, tensor, shapes[name], "(D,)" if name.endswith("weight") else "(L, D / 2)")
        check_parameter(name, tensor)
    check_alike(_NAMES, tensors, dtype=False)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        check_real(name, tensor)
    start, _ = check_tangents(("qk",), (qk,), tangents, tangent_start)
    kernel = runs_kernel(qk)
    if kernel:
        check_kernel_row(qk, _NAMES, tensors, qk.dtype)
    return kernel, start


def _tile(qk: Tensor, config: RowConfig) -> dict[str, int]:
    """Constants of the kernels: heads are taken so many at once that a thread has 8 columns of a tile, 16 bytes of 16
    bits.
    """
    heads, head_dim = qk.shape[3:]
    block, warps = next_power_of_two(head_dim), config.num_warps(2 * heads * head_dim)
    at_once = math.gcd(heads, next_power_of_two(max(1, 256 * warps // block)))
    return {"H": heads, "HEADS": at_once, "D": head_dim, "BLOCK_D": block}


def _row(x: Tensor | None) -> Tensor | None:
    """The columns of all heads as one: a view where they lie side by side, as in a packed projection."""
    return None if x is None else x.flatten(2)


def forward_launch(
    qk: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    out: tuple,
    qk_dot: Tensor | None,
    out_dot: tuple,
    tangent_start: int,
    eps: float,
    config: RowConfig = FORWARD,
) -> Launch:
    """out = (q, k) of qk, with parameters = (q_weight, k_weight, cos, sin); out_dot, unless (None, None), of the
    samples from tangent_start on.
    """
    from .kernel import _qk_rope_kernel

    return row_launch(
        _qk_rope_kernel,
        config,
        rows={"qk": _row(qk), "qk_dot": _row(qk_dot)},
        vectors={},
        contiguous={name: x.contiguous() for name, x in zip(_NAMES[1:], parameters, strict=True)}
        | dict(zip(("q", "k", "q_dot", "k_dot"), (*out, *out_dot), strict=True)),
        scalars={
            "tangent_start": tangent_start,
            "tangent_samples": 0 if qk_dot is None else qk_dot.shape[0],
            "eps": eps,
        },
        tile=_tile(qk, config),
    )


def backward_launches(
    qk: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor],
    dqk: Tensor,
    sums: tuple[Tensor, Tensor],
    eps: float,
    config: RowConfig = BACKWARD,
    sums_config: TileConfig = SUMS,
) -> tuple[Launch, Launch]:
    """dqk of cotangents = (dq, dk) and each program's sums, then sums = (dq_weight, dk_weight) from those."""
    from ..partials import sum_partials
    from .kernel import _qk_rope_bwd_kernel

    rows = {name: _row(x) for name, x in zip(("qk", "dq", "dk"), (qk, *cotangents), strict=True)}
    partial = partial_sums(2, rows["qk"], config, width=qk.shape[4])
    contiguous = {name: x.contiguous() for name, x in zip(_NAMES[1:], parameters, strict=True)}
    first = row_launch(
        _qk_rope_bwd_kernel,
        config,
        rows=rows,
        vectors={},
        contiguous=contiguous | {"dqk": dqk, "partial": partial},
        scalars={"eps": eps},
        scratch=partial,
        tile=_tile(qk, config),
    )
    return first, sum_partials(partial, [total[None] for total in sums], sums_config)


def _outputs(qk: Tensor) -> tuple[Tensor, Tensor]:
    """Room for q and k."""
    shape = (*qk.shape[:2], *qk.shape[3:])
    return qk.new_empty(shape), qk.new_empty(shape)


@kernel_op("meanflow_kernels::qk_rope")
def _qk_rope(
    qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Launched[tuple[Tensor, Tensor]]:
    out = _outputs(qk)
    return out, (forward_launch, qk, (q_weight, k_weight, cos, sin), out, None, (None, None), 0, eps, FORWARD)


@kernel_op("meanflow_kernels::qk_rope_jvp")
def _qk_rope_jvp(
    qk: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_dot: Tensor,
    tangent_start: int,
    eps: float,
) -> Launched[tuple[Tensor, Tensor, Tensor, Tensor]]:
    out, out_dot, parameters = _outputs(qk), _outputs(qk_dot), (q_weight, k_weight, cos, sin)
    return (*out, *out_dot), (forward_launch, qk, parameters, out, qk_dot, out_dot, tangent_start, eps, FORWARD)


@kernel_op("meanflow_kernels::qk_rope_bwd")
def _qk_rope_bwd(
    qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, eps: float
) -> Launched[tuple[Tensor, Tensor, Tensor]]:
    dqk, *sums = grads = empty_like(qk, q_weight, k_weight)
    parameters = (q_weight, k_weight, cos, sin)
    return grads, (backward_launches, qk, parameters, (dq, dk), dqk, sums, eps, BACKWARD, SUMS)


def _backward(qk, q_weight, k_weight, cos, sin, dq, dk, eps):
    # one of them alone was used: rare enough to pay for zeros
    dq, dk = (qk.new_zeros(qk[:, :, 0].shape) if x is None else x for x in (dq, dk))
    return _qk_rope_bwd(qk, q_weight, k_weight, cos, sin, dq, dk, eps)


differentiate(
    _qk_rope,
    _qk_rope_jvp,
    keep=lambda operands, output: (operands[:5], operands[-1:]),
    backward=_backward,
    results=2,
)


def compile_cases(arch: int) -> list[CompileCase]:
    """Every launch config, at the widths of the iMF family, for cross-compilation; one for all architectures."""
    cases = []
    for heads in (12, 16):
        qk = torch.empty(32, 276, 3, heads, 64, dtype=torch.bfloat16, device="meta")[:, :, :2]
        weight, table = (torch.empty(size, device="meta") for size in ((64,), (276, 32)))
        parameters, out = (weight, weight, table, table), _outputs(qk)
        backward, sums = backward_launches(qk, parameters, out, torch.empty_like(qk), (weight, weight), 1e-6)
        launches = {
            "qk_rope": forward_launch(qk, parameters, out, None, (None, None), 0, 1e-6),
            "qk_rope_jvp": forward_launch(qk, parameters, out, qk, out, 0, 1e-6),
            "qk_rope_bwd": backward,
            "qk_rope_bwd sums": sums,
        }
        for op, launch in launches.items():
            label = f"w{launch.num_warps} s{launch.num_stages}"
            cases.append(CompileCase(op, label, qk.dtype, heads * 64, launch))
    return cases


def qk_rope(
    qk: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Queries and keys for attention: RMSNorm over D of each head, then rotary embedding (Su et al., arXiv 2104.09864).

    Args:
        qk: queries and keys side by side (B, L, 2, H, D), D even: of a packed projection (B, L, 3, H, D) the part
            before the values, read where it lies. One whose heads are not side by side is copied. Computed in fp32
            whatever its dtype (fp64 where it is fp64, which runs the reference alone). Split the projection by
            ``qkv.split((2, 1), 2)``, whose backward puts both gradients together in one pass.
        q_weight, k_weight: (D,), of the norms, shared by the heads. Parameters, of any dtype: no tangents.
        cos, sin: (L, D / 2) of the angles by which columns (2 i, 2 i + 1) are rotated; constants, in fp32 or more.
        eps: added to the mean square.

    Returns:
        q and k (B, L, H, D), contiguous, in qk's dtype. Under forward-mode AD both carry their tangents.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, _ = _check(qk, q_weight, k_weight, cos, sin)
    primals, tangents = unpack(qk)
    if not absent(tangents):
        (q, k), (q_dot, k_dot) = qk_rope_jvp(primals, tangents, q_weight, k_weight, cos, sin, eps=eps)
        return pack(q, q_dot), pack(k, k_dot)
    if not kernel:
        q, k = qk_rope_ref(*once(*primals, q_weight, k_weight), cos, sin, eps=eps)
        return q.to(qk.dtype), k.to(qk.dtype)
    return _qk_rope(*primals, q_weight, k_weight, cos, sin, eps)


def qk_rope_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    tangent_start: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """:func:`qk_rope` and its tangents in one pass: (qk,), (qk_dot,), weights, table -> (q, k), (q_dot, k_dot).

    Args:
        primals: qk (B, L, 2, H, D). tangents: qk_dot (n, L, 2, H, D), qk's dtype; None is structurally zero.
        q_weight, k_weight, cos, sin, eps: as for :func:`qk_rope`.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        (q, k) and (q_dot, k_dot), the tangents (n, L, H, D), or (None, None). Gradients flow through q and k to qk and
        the weights; one asked of a tangent raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return qk_rope(*primals, q_weight, k_weight, cos, sin, eps=eps), (None, None)
    (qk,), (qk_dot,) = primals, tangents
    kernel, tangent_start = _check(qk, q_weight, k_weight, cos, sin, tangents, tangent_start=tangent_start)
    if kernel:
        operands = (qk, q_weight, k_weight, cos, sin, qk_dot, tangent_start, eps)
        q, k, q_dot, k_dot = _qk_rope_jvp(*operands)
        return (q, k), (q_dot, k_dot)
    q, k = qk_rope_ref(*once(qk, q_weight, k_weight), cos, sin, eps=eps)
    with torch.no_grad():
        (rows,) = tangent_rows(primals, tangents, tangent_start)
        q_dot, k_dot = qk_rope_tangent_ref(rows, q_weight, k_weight, cos, sin, qk_dot, eps=eps)
    inputs, dtype = (qk, q_weight, k_weight, qk_dot), qk.dtype
    return (q.to(dtype), k.to(dtype)), (
        forbid_gradient(q_dot.to(dtype), *inputs),
        forbid_gradient(k_dot.to(dtype), *inputs),
    )
