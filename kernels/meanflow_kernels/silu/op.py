"""SiLU on (primal, tangent) pairs: checks, launch, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_kernel_dtype, check_real, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..tiling import ceil_div
from .config import BLOCK, NUM_WARPS
from .reference import silu_ref, silu_tangent_ref


@once_a_kind
def _check(x: Tensor, tangents: tuple = (), *, tangent_start: int | None = None) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fail("x", got, "a tensor (B, ...)", "unsqueeze it")
    check_real("x", x)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_dtype("x", x)
    return kernel, check_tangents(("x",), (x,), tangents, tangent_start)[0]


def _launch(x: Tensor, y: Tensor | None, x_dot: Tensor | None, y_dot: Tensor | None, tangent_start: int = 0) -> Launch:
    """y = silu(x); y_dot = silu'(x) x_dot of the samples from tangent_start on. For dx = silu'(x) dy too."""
    from .kernel import _silu_kernel

    return Launch(
        kernel=_silu_kernel,
        grid=(ceil_div(x.numel(), BLOCK),),
        args={
            "x_ptr": x.contiguous(),
            "y_ptr": y,
            "x_dot_ptr": None if x_dot is None else x_dot.contiguous(),
            "y_dot_ptr": y_dot,
            "N": x.numel(),
            "tangent_start": tangent_start * (x.numel() // max(1, x.shape[0])),
            "tangent_size": 0 if x_dot is None else x_dot.numel(),
        },
        constexprs={"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        num_stages=1,
    )


@kernel_op("meanflow_kernels::silu")
def _silu(x: Tensor) -> Launched[Tensor]:
    y = x.new_empty(x.shape)
    return y, (_launch, x, y, None, None)


@kernel_op("meanflow_kernels::silu_jvp")
def _silu_jvp(x: Tensor, x_dot: Tensor, tangent_start: int) -> Launched[tuple[Tensor, Tensor]]:
    y, y_dot = empty_like(x, x_dot)
    return (y, y_dot), (_launch, x, y, x_dot, y_dot, tangent_start)


@kernel_op("meanflow_kernels::silu_bwd")
def _silu_bwd(x: Tensor, dy: Tensor) -> Launched[Tensor]:
    dx = x.new_empty(x.shape)
    return dx, (_launch, x, None, dy, dx)


differentiate(_silu, _silu_jvp, keep=lambda operands, y: (operands[:1], ()), backward=_silu_bwd)


def compile_cases(arch: int) -> list[CompileCase]:
    """The launch config, for cross-compilation: one for all widths and architectures."""
    x = torch.empty(32, 1152, dtype=torch.bfloat16, device="meta")
    launches = {"silu": _launch(x, x, None, None), "silu_jvp": _launch(x, x, x, x), "silu_bwd": _launch(x, None, x, x)}
    return [CompileCase(op, f"{BLOCK} w{NUM_WARPS}", x.dtype, 1152, c) for op, c in launches.items()]


def silu(x: Tensor) -> Tensor:
    """y = x sigmoid(x), in x's dtype (computed in fp32; in fp64 where x is fp64, which runs the reference alone).

    Args:
        x: (B, ...), any strides; one that is not contiguous is copied.

    Returns:
        y like x, contiguous. Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: x is no floating-point tensor of at least one dimension, or of a dtype the kernel does not take.
    """
    kernel, _ = _check(x)
    primals, tangents = unpack(x)
    if not absent(tangents):
        return pack(*silu_jvp(primals, tangents))
    if not kernel:
        return silu_ref(*once(*primals)).to(x.dtype)
    return _silu(*primals)


def silu_jvp(
    primals: tuple[Tensor], tangents: tuple[Tensor | None], *, tangent_start: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`silu` and its tangent silu'(x) x_dot in one pass: (x,), (x_dot,) -> y, y_dot.

    Args:
        primals: x (B, ...). tangents: x_dot (n, ...), x's dtype; None is structurally zero.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y like x, and y_dot like x_dot, or None. Gradients flow through y to x; one asked of y_dot raises
        :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return silu(*primals), None
    (x,), (x_dot,) = primals, tangents
    kernel, tangent_start = _check(x, tangents, tangent_start=tangent_start)
    if kernel:
        return _silu_jvp(x, x_dot, tangent_start)
    with torch.no_grad():
        y_dot = silu_tangent_ref(*tangent_rows(primals, tangents, tangent_start), x_dot).to(x.dtype)
    return silu_ref(*once(x)).to(x.dtype), forbid_gradient(y_dot, x, x_dot)
