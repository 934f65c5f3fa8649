"""Gated residual + the next adaln on (primal, tangent) pairs: checks, launches, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_alike, check_kernel_dtype, check_parameter, check_real, check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..rows.config import RowConfig
from ..rows.launch import check_kernel_row, check_vectors, partial_sums, row_cases, row_launch, stream_and_norm
from ..tiling import TileConfig
from .config import BACKWARD, FORWARD, PRIMAL, SUMS
from .reference import gate_adaln_ref, gate_adaln_tangent_ref

_NAMES = ("x", "y", "gate", "shift", "scale")


@once_a_kind
def _check(
    primals: tuple,
    bias: Tensor | None,
    tangents: tuple = (),
    *,
    out_dtype: torch.dtype | None,
    tangent_start: int | None = None,
) -> tuple[bool, int, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, where the tangents begin, and how many they are."""
    x, y, *vectors = primals
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_shape("y", y, tuple(x.shape), "x's shape (B, L, C)")
    check_alike(("x", "y"), (x, y), dtype=False)
    check_vectors(x, _NAMES[2:], vectors)
    check_real("y", y)
    if bias is not None:
        check_shape("bias", bias, (x.shape[2],), "(C,)")
        check_alike(("x", "bias"), (x, bias), dtype=False)
        check_real("bias", bias)
        if tangents:
            check_parameter("bias", bias)
    start, n = check_tangents(_NAMES, primals, tangents, tangent_start)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_row(x, _NAMES, primals, out_dtype or x.dtype)
        if bias is not None:
            check_kernel_dtype("bias", bias)
    return kernel, start, n


def forward_launch(
    primals: tuple,
    bias: Tensor | None,
    tangents: tuple,
    out: tuple,
    out_dot: tuple,
    tangent_start: int,
    eps: float,
    config: RowConfig = FORWARD,
) -> Launch:
    """out = (x_out, h) of the primals; out_dot, unless (None, None), of the samples from tangent_start on."""
    from .kernel import _gate_adaln_kernel

    named = dict(zip((*_NAMES, *[f"{name}_dot" for name in _NAMES]), (*primals, *tangents), strict=True))
    rows = ("x", "y", "x_dot", "y_dot")
    return row_launch(
        _gate_adaln_kernel,
        config,
        rows={name: named[name] for name in rows},
        vectors={name: vector for name, vector in named.items() if name not in rows},
        contiguous=dict(zip(("x_out", "h", "x_out_dot", "h_dot"), (*out, *out_dot), strict=True))
        | {"bias": None if bias is None else bias.contiguous()},
        scalars={
            "tangent_start": tangent_start,
            "tangent_samples": 0 if out_dot[1] is None else out_dot[1].shape[0],
            "eps": eps,
        },
    )


def backward_launches(
    x_out,
    y,
    gate,
    scale,
    bias,
    dx_out,
    dh,
    dx,
    dy,
    sums,
    dbias,
    eps,
    config: RowConfig = BACKWARD,
    sums_config: TileConfig = SUMS,
) -> tuple[Launch, Launch]:
    """dx, dy and each program's sums, then sums = [dshift, dscale, dgate], and dbias, from those."""
    from ..partials import sum_partials
    from .kernel import _gate_adaln_bwd_kernel

    partial = partial_sums(3 if bias is None else 4, x_out, config)
    first = row_launch(
        _gate_adaln_bwd_kernel,
        config,
        rows={"y": y, "dx_out": dx_out, "dh": dh},
        vectors={"gate": gate, "scale": scale},
        contiguous={"x_out": x_out, "dx": dx, "dy": dy, "partial": partial}
        | {"bias": None if bias is None else bias.contiguous()},
        scalars={"eps": eps},
        scratch=partial,
    )
    return first, sum_partials(partial, sums, sums_config, None if bias is None else dbias)


@kernel_op("meanflow_kernels::gate_adaln")
def _gate_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Launched[tuple[Tensor, Tensor]]:
    out = stream_and_norm(x, x.shape[0], out_dtype)
    return out, (forward_launch, (x, y, gate, shift, scale), bias, (None,) * 5, out, (None, None), 0, eps, PRIMAL)


@kernel_op("meanflow_kernels::gate_adaln_jvp")
def _gate_adaln_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    gate_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    tangent_start: int,
    tangent_samples: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Launched[tuple[Tensor, Tensor, Tensor, Tensor]]:
    out, out_dot = stream_and_norm(x, x.shape[0], out_dtype), stream_and_norm(x, tangent_samples, out_dtype)
    primals, tangents = (x, y, gate, shift, scale), (x_dot, y_dot, gate_dot, shift_dot, scale_dot)
    launch = (forward_launch, primals, bias, tangents, out, out_dot, tangent_start, eps, FORWARD)
    return (*out, *out_dot), launch


@kernel_op("meanflow_kernels::gate_adaln_bwd")
def _gate_adaln_bwd(
    x_out: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dx_out: Tensor | None,
    dh: Tensor,
    eps: float,
) -> Launched[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    dx, dy, dgate, dshift, dscale = empty_like(x_out, y, gate, gate, gate)
    dbias = y.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    inputs, sums = (x_out, y, gate, scale, bias, dx_out, dh), [dshift, dscale, dgate]
    launch = (backward_launches, *inputs, dx, dy, sums, dbias, eps, BACKWARD, SUMS)
    return (dx, dy, dgate, dshift, dscale, dbias), launch


def _keep(operands, output):
    # x_out serves in x's place: the next layer keeps it anyhow
    _, y, gate, _, scale, bias, *_ = operands
    return (output[0], y, gate, scale, bias), (operands[-2], output[1].dtype)


def _backward(x_out, y, gate, scale, bias, dx_out, dh, eps, h_dtype):
    # the residual alone was used: rare enough to pay for zeros
    dh = x_out.new_zeros(x_out.shape, dtype=h_dtype) if dh is None else dh
    *grads, dbias = _gate_adaln_bwd(x_out, y, gate, scale, bias, dx_out, dh, eps)
    return *grads, None if bias is None else dbias


differentiate(_gate_adaln, _gate_adaln_jvp, keep=_keep, backward=_backward, results=2)


def _launches(x: Tensor, y: Tensor, vector: Tensor) -> dict[str, Launch]:
    primals, sums = (x, y, vector, vector, vector), [vector.new_empty(vector.shape) for _ in range(3)]
    # a parameter is in the stream's dtype
    bias = x.new_empty(x.shape[2])
    backward, sums = backward_launches(x, y, vector, vector, bias, x, y, x, y, sums, bias, 1e-6)
    return {
        "gate_adaln": forward_launch(primals, bias, (None,) * 5, (x, y), (None, None), 0, 1e-6, PRIMAL),
        "gate_adaln_jvp": forward_launch(primals, bias, primals, (x, y), (x, y), 0, 1e-6),
        "gate_adaln_bwd": backward,
        "gate_adaln_bwd sums": sums,
    }


def compile_cases(arch: int) -> list[CompileCase]:
    """Every launch config, for cross-compilation; one for all architectures."""
    return row_cases(_launches)


def gate_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x_out = x + gate (y + bias), h = LayerNorm(x_out) (1 + scale) + shift: a branch's end and the next's beginning.

    Args:
        x: the residual stream (B, L, C). y: the branch (B, L, C), of a dtype of its own.
        gate, shift, scale: (B, C), of one dtype, which may differ from x's and y's. Chunks of a (B, 6 C) projection are
            read in place; of all arguments only one whose last stride is not 1 is copied.
        bias: (C,), of any dtype the kernel takes, or None: of the branch's last layer, whose product alone is y then.
        eps: added to the variance. out_dtype: dtype of h, default x's.

    Returns:
        x_out (B, L, C) in x's dtype, and h (B, L, C) in out_dtype, normalised from the sum before it is rounded.
        Under forward-mode AD both carry their tangents.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, *_ = _check((x, y, gate, shift, scale), bias, out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    (*primals, bias), (*tangents, bias_dot) = unpack(x, y, gate, shift, scale, bias)
    if bias_dot is not None:
        # the bias enters as y does
        bias_dot = bias_dot.to(y.dtype)
        tangents[1] = bias_dot.expand_as(y) if tangents[1] is None else tangents[1] + bias_dot
    if not absent(tangents):
        (x_out, h), (x_out_dot, h_dot) = gate_adaln_jvp(primals, tangents, bias=bias, eps=eps, out_dtype=out_dtype)
        return pack(x_out, x_out_dot), pack(h, h_dot)
    if not kernel:
        x_out, h = gate_adaln_ref(*once(*primals, bias), eps=eps)
        return x_out.to(x.dtype), h.to(out_dtype)
    return _gate_adaln(*primals, bias, eps, out_dtype)


def gate_adaln_jvp(
    primals: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """:func:`gate_adaln` and its tangents in one pass: (x, y, gate, shift, scale) and theirs -> (x_out, h), theirs.

    Args:
        primals: as for :func:`gate_adaln`.
        tangents: each shaped like its primal but for the batch n, in its dtype; None is structurally zero.
        bias: as for :func:`gate_adaln`; a parameter: it has no tangent.
        tangent_start: the tangents belong to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        (x_out, h), (x_out_dot, h_dot); the tangents are (n, L, C), in the dtypes of their primals, and both None where
        every tangent is None. Gradients flow through x_out and h to the primals and the bias; one asked of a tangent
        raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return gate_adaln(*primals, bias=bias, eps=eps, out_dtype=out_dtype), (None, None)
    kernel, tangent_start, n = _check(primals, bias, tangents, out_dtype=out_dtype, tangent_start=tangent_start)
    x = primals[0]
    out_dtype = out_dtype or x.dtype
    if kernel:
        operands = (*primals, bias, *tangents, tangent_start, n, eps, out_dtype)
        x_out, h, x_out_dot, h_dot = _gate_adaln_jvp(*operands)
        return (x_out, h), (x_out_dot, h_dot)
    x_out, h = gate_adaln_ref(*once(*primals, bias), eps=eps)
    with torch.no_grad():
        rows = tangent_rows(primals, tangents, tangent_start)
        x_out_dot, h_dot = gate_adaln_tangent_ref(rows, tangents, bias, eps=eps)
    x_out_dot, h_dot = x_out_dot.to(x.dtype), h_dot.to(out_dtype)
    inputs = (*primals, *tangents, bias)
    return (x_out.to(x.dtype), h.to(out_dtype)), (forbid_gradient(x_out_dot, *inputs), forbid_gradient(h_dot, *inputs))
