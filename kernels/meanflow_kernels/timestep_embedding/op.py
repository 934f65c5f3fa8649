"""Sinusoidal time features on (primal, tangent) pairs: checks, launches, registration, public functions."""

import math

import torch
from torch import Tensor

from ..checks import check_kernel_dtype, check_real, check_shape, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, kernel_op
from ..routing import runs_kernel
from ..tiling import next_power_of_two
from .config import NUM_WARPS
from .reference import timestep_embedding_ref, timestep_embedding_tangent_ref


@once_a_kind
def _check(
    t: Tensor, tangents: tuple = (), *, dim: int, max_period: float, tangent_start: int | None = None
) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    check_shape("t", t, (None,), "(B,)")
    check_real("t", t)
    if dim < 2:
        fail("dim", dim, "at least 2", "one cosine and one sine are the least")
    if not 0 < max_period < math.inf:
        fail("max_period", max_period, "a positive number", "DiT uses 10000")
    kernel = runs_kernel(t)
    if kernel:
        check_kernel_dtype("t", t)
    return kernel, check_tangents(("t",), (t,), tangents, tangent_start)[0]


def _launch(kernel, t: Tensor, dim: int, max_period: float, **args) -> Launch:
    half = dim // 2
    rate = math.log2(max_period) / half
    # ten bits behind the point: exact in fp32 when multiplied by an index
    step = round(1024 * rate) / 1024
    return Launch(
        kernel=kernel,
        grid=(t.shape[0],),
        args={"t_ptr": t, "stride_t": t.stride(0), "step": step, "step_rest": rate - step, **args},
        constexprs={"DIM": dim, "BLOCK": next_power_of_two(half)},
        num_warps=NUM_WARPS,
        num_stages=1,
    )


def _forward(
    t: Tensor, y: Tensor, t_dot: Tensor | None, y_dot: Tensor | None, tangent_start: int, max_period: float
) -> Launch:
    from .kernel import _timestep_embedding_kernel

    return _launch(
        _timestep_embedding_kernel,
        t,
        y.shape[1],
        max_period,
        y_ptr=y,
        t_dot_ptr=t_dot,
        y_dot_ptr=y_dot,
        stride_t_dot=0 if t_dot is None else t_dot.stride(0),
        tangent_start=tangent_start,
        tangent_samples=0 if t_dot is None else t_dot.shape[0],
    )


def _backward(t: Tensor, dy: Tensor, dt: Tensor, max_period: float) -> Launch:
    from .kernel import _timestep_embedding_bwd_kernel

    dy = dy.contiguous()
    return _launch(_timestep_embedding_bwd_kernel, t, dy.shape[1], max_period, dy_ptr=dy, dt_ptr=dt)


@kernel_op("meanflow_kernels::timestep_embedding")
def _timestep_embedding(t: Tensor, dim: int, max_period: float) -> Launched[Tensor]:
    y = t.new_empty((t.shape[0], dim))
    return y, (_forward, t, y, None, None, 0, max_period)


@kernel_op("meanflow_kernels::timestep_embedding_jvp")
def _timestep_embedding_jvp(
    t: Tensor, t_dot: Tensor, dim: int, tangent_start: int, max_period: float
) -> Launched[tuple[Tensor, Tensor]]:
    y, y_dot = t.new_empty((t.shape[0], dim)), t.new_empty((t_dot.shape[0], dim))
    return (y, y_dot), (_forward, t, y, t_dot, y_dot, tangent_start, max_period)


@kernel_op("meanflow_kernels::timestep_embedding_bwd")
def _timestep_embedding_bwd(t: Tensor, dy: Tensor, max_period: float) -> Launched[Tensor]:
    dt = t.new_empty(t.shape)
    return dt, (_backward, t, dy, dt, max_period)


differentiate(
    _timestep_embedding,
    _timestep_embedding_jvp,
    keep=lambda operands, y: (operands[:1], operands[-1:]),
    backward=_timestep_embedding_bwd,
)


def compile_cases(arch: int) -> list[CompileCase]:
    """The launch config at DiT's 256 features, for cross-compilation; the same for all architectures."""
    t, y = torch.empty(32, device="meta"), torch.empty(32, 256, device="meta")
    launches = {
        "timestep_embedding": _forward(t, y, None, None, 0, 1e4),
        "timestep_embedding_jvp": _forward(t, y, t, y, 0, 1e4),
        "timestep_embedding_bwd": _backward(t, y, t, 1e4),
    }
    return [CompileCase(op, f"w{NUM_WARPS}", t.dtype, 256, c) for op, c in launches.items()]


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """Cosines, then sines, of t max_period^(-i / (dim // 2)): DiT's time features (Peebles & Xie, arXiv 2212.09748).

    Args:
        t: (B,); the features come in its dtype (computed in fp32; in fp64 where t is, which runs the reference alone).
        dim: number of features; an odd one ends with a zero. max_period: the longest period over 2 pi.

    Returns:
        (B, dim), contiguous. Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: t is no floating-point vector of a dtype the kernel takes, dim < 2, or max_period <= 0.
    """
    kernel, _ = _check(t, dim=dim, max_period=max_period)
    primals, tangents = unpack(t)
    if not absent(tangents):
        return pack(*timestep_embedding_jvp(primals, tangents, dim, max_period=max_period))
    if not kernel:
        return timestep_embedding_ref(*once(*primals), dim, max_period).to(t.dtype)
    return _timestep_embedding(*primals, dim, max_period)


def timestep_embedding_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    dim: int,
    *,
    max_period: float = 10000.0,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`timestep_embedding` and its tangent in one pass: (t,), (t_dot,), dim -> y, y_dot.

    Args:
        primals: t (B,). tangents: t_dot (n,), t's dtype; None is structurally zero.
        dim, max_period: as for :func:`timestep_embedding`.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, dim), and y_dot (n, dim) or None. Gradients flow through y to t; one asked of y_dot raises
        :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: as for :func:`timestep_embedding`, or a tangent that does not match t.
    """
    if absent(tangents):
        return timestep_embedding(*primals, dim, max_period=max_period), None
    (t,), (t_dot,) = primals, tangents
    kernel, tangent_start = _check(t, tangents, dim=dim, max_period=max_period, tangent_start=tangent_start)
    if kernel:
        return _timestep_embedding_jvp(t, t_dot, dim, tangent_start, max_period)
    with torch.no_grad():
        y_dot = timestep_embedding_tangent_ref(*tangent_rows(primals, tangents, tangent_start), t_dot, dim, max_period)
    return timestep_embedding_ref(*once(t), dim, max_period).to(t.dtype), forbid_gradient(y_dot.to(t.dtype), t, t_dot)
