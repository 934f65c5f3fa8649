"""Gated residual + the next rmsnorm on (primal, tangent) pairs: checks, launches, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..rows.config import RowConfig
from ..rows.launch import IMF_WIDTHS, check_kernel_row, partial_sums, row_cases, row_launch, stream_and_norm
from ..tiling import TileConfig
from .config import BACKWARD, FORWARD, SUMS
from .reference import gate_rmsnorm_ref, gate_rmsnorm_tangent_ref

_NAMES = ("x", "y", "gate", "weight")


@once_a_kind
def _check(
    primals: tuple,
    gate: Tensor,
    weight: Tensor,
    tangents: tuple = (),
    *,
    out_dtype: torch.dtype | None,
    tangent_start: int | None = None,
) -> tuple[bool, int, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, where the tangents begin, and how many they are."""
    x, y = primals
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_shape("y", y, tuple(x.shape), "x's shape (B, L, C)")
    for name, vector in (("gate", gate), ("weight", weight)):
        check_shape(name, vector, (x.shape[2],), "(C,)")
        check_parameter(name, vector)
    tensors = (x, y, gate, weight)
    check_alike(_NAMES, tensors, dtype=False)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        check_real(name, tensor)
    start, n = check_tangents(_NAMES[:2], primals, tangents, tangent_start)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_row(x, _NAMES, tensors, out_dtype or x.dtype)
    return kernel, start, n


def forward_launch(
    primals: tuple,
    tangents: tuple,
    gate: Tensor,
    weight: Tensor,
    out: tuple,
    out_dot: tuple,
    tangent_start: int,
    eps: float,
    config: RowConfig = FORWARD,
) -> Launch:
    """out = (x_out, h) of the primals (x, y); out_dot, unless (None, None), of the samples from tangent_start on."""
    from .kernel import _gate_rmsnorm_kernel

    return row_launch(
        _gate_rmsnorm_kernel,
        config,
        rows=dict(zip(("x", "y", "x_dot", "y_dot"), (*primals, *tangents), strict=True)),
        vectors={},
        contiguous={"gate": gate.contiguous(), "weight": weight.contiguous()}
        | dict(zip(("x_out", "h", "x_out_dot", "h_dot"), (*out, *out_dot), strict=True)),
        scalars={
            "tangent_start": tangent_start,
            "tangent_samples": 0 if out_dot[1] is None else out_dot[1].shape[0],
            "eps": eps,
        },
    )


def backward_launches(
    x_out, y, gate, weight, dx_out, dh, dx, dy, sums, eps, config: RowConfig = BACKWARD, sums_config: TileConfig = SUMS
) -> tuple[Launch, Launch]:
    """dx, dy and each program's sums, then sums = [dgate, dweight] from those."""
    from ..partials import sum_partials
    from .kernel import _gate_rmsnorm_bwd_kernel

    partial = partial_sums(2, x_out, config)
    contiguous = {"x_out": x_out, "gate": gate.contiguous(), "weight": weight.contiguous()}
    first = row_launch(
        _gate_rmsnorm_bwd_kernel,
        config,
        rows={"y": y, "dx_out": dx_out, "dh": dh},
        vectors={},
        contiguous=contiguous | {"dx": dx, "dy": dy, "partial": partial},
        scalars={"eps": eps},
        scratch=partial,
    )
    return first, sum_partials(partial, [total[None] for total in sums], sums_config)


@kernel_op("meanflow_kernels::gate_rmsnorm")
def _gate_rmsnorm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Launched[tuple[Tensor, Tensor]]:
    out = stream_and_norm(x, x.shape[0], out_dtype)
    return out, (forward_launch, (x, y), (None, None), gate, weight, out, (None, None), 0, eps, FORWARD)


@kernel_op("meanflow_kernels::gate_rmsnorm_jvp")
def _gate_rmsnorm_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    tangent_start: int,
    tangent_samples: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Launched[tuple[Tensor, Tensor, Tensor, Tensor]]:
    out, out_dot = stream_and_norm(x, x.shape[0], out_dtype), stream_and_norm(x, tangent_samples, out_dtype)
    operands = ((x, y), (x_dot, y_dot), gate, weight, out, out_dot, tangent_start, eps)
    return (*out, *out_dot), (forward_launch, *operands, FORWARD)


@kernel_op("meanflow_kernels::gate_rmsnorm_bwd")
def _gate_rmsnorm_bwd(
    x_out: Tensor, y: Tensor, gate: Tensor, weight: Tensor, dx_out: Tensor | None, dh: Tensor, eps: float
) -> Launched[tuple[Tensor, Tensor, Tensor, Tensor]]:
    dx, dy, *sums = grads = empty_like(x_out, y, gate, weight)
    return grads, (backward_launches, x_out, y, gate, weight, dx_out, dh, dx, dy, sums, eps, BACKWARD, SUMS)


def _keep(operands, output):
    # x_out serves in x's place: the next layer keeps it anyhow
    return (output[0], *operands[1:4]), (operands[-2], output[1].dtype)


def _backward(x_out, y, gate, weight, dx_out, dh, eps, h_dtype):
    # the residual alone was used: rare enough to pay for zeros
    dh = x_out.new_zeros(x_out.shape, dtype=h_dtype) if dh is None else dh
    return _gate_rmsnorm_bwd(x_out, y, gate, weight, dx_out, dh, eps)


differentiate(_gate_rmsnorm, _gate_rmsnorm_jvp, keep=_keep, backward=_backward, results=2)


def _launches(x: Tensor, y: Tensor, vector: Tensor) -> dict[str, Launch]:
    pair, none, parameter = (x, y), (None, None), x.new_empty(x.shape[2])
    backward, sums = backward_launches(x, y, parameter, parameter, x, y, x, y, [parameter] * 2, 1e-6)
    return {
        "gate_rmsnorm": forward_launch(pair, none, parameter, parameter, pair, none, 0, 1e-6),
        "gate_rmsnorm_jvp": forward_launch(pair, pair, parameter, parameter, pair, pair, 0, 1e-6),
        "gate_rmsnorm_bwd": backward,
        "gate_rmsnorm_bwd sums": sums,
    }


def compile_cases(arch: int) -> list[CompileCase]:
    """Every launch config, for cross-compilation; one for all architectures."""
    return row_cases(_launches, IMF_WIDTHS)


def gate_rmsnorm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x_out = x + gate y, and h = rmsnorm(x_out): a branch's end and the next one's beginning.

    Args:
        x: the residual stream (B, L, C). y: the branch (B, L, C), of a dtype of its own. Any strides; one whose last is
            not 1 is copied.
        gate: (C,), the same for every sample. weight: (C,), of the norm. Parameters, of any dtype: no tangents.
        eps: added to the mean square. out_dtype: dtype of h, default x's.

    Returns:
        x_out (B, L, C) in x's dtype, and h (B, L, C) in out_dtype, normalised from the sum before it is rounded.
        Under forward-mode AD both carry their tangents.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, *_ = _check((x, y), gate, weight, out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    primals, tangents = unpack(x, y)
    if not absent(tangents):
        (x_out, h), (x_out_dot, h_dot) = gate_rmsnorm_jvp(primals, tangents, gate, weight, eps=eps, out_dtype=out_dtype)
        return pack(x_out, x_out_dot), pack(h, h_dot)
    if not kernel:
        x_out, h = gate_rmsnorm_ref(*once(*primals, gate, weight), eps=eps)
        return x_out.to(x.dtype), h.to(out_dtype)
    return _gate_rmsnorm(*primals, gate, weight, eps, out_dtype)


def gate_rmsnorm_jvp(
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None],
    gate: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """:func:`gate_rmsnorm` and its tangents in one pass: (x, y), (x_dot, y_dot), gate, weight -> (x_out, h), theirs.

    Args:
        primals: as for :func:`gate_rmsnorm`.
        tangents: each shaped like its primal but for the batch n, in its dtype; None is structurally zero.
        gate, weight, eps, out_dtype: as for :func:`gate_rmsnorm`.
        tangent_start: the tangents belong to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        (x_out, h), (x_out_dot, h_dot); the tangents are (n, L, C), in the dtypes of their primals, and both None where
        every tangent is None. Gradients flow through x_out and h to x, y, gate and weight; one asked of a tangent
        raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return gate_rmsnorm(*primals, gate, weight, eps=eps, out_dtype=out_dtype), (None, None)
    kernel, tangent_start, n = _check(primals, gate, weight, tangents, out_dtype=out_dtype, tangent_start=tangent_start)
    x_dtype, out_dtype = primals[0].dtype, out_dtype or primals[0].dtype
    if kernel:
        operands = (*primals, gate, weight, *tangents, tangent_start, n, eps, out_dtype)
        x_out, h, x_out_dot, h_dot = _gate_rmsnorm_jvp(*operands)
        return (x_out, h), (x_out_dot, h_dot)
    x_out, h = gate_rmsnorm_ref(*once(*primals, gate, weight), eps=eps)
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        x_out_dot, h_dot = gate_rmsnorm_tangent_ref(rows, tangents, gate, weight, eps=eps)
    inputs = (*primals, *tangents, gate, weight)
    x_out_dot, h_dot = forbid_gradient(x_out_dot.to(x_dtype), *inputs), forbid_gradient(h_dot.to(out_dtype), *inputs)
    return (x_out.to(x_dtype), h.to(out_dtype)), (x_out_dot, h_dot)
