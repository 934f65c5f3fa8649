"""SwiGLU on (primal, tangent) pairs: checks, launches, registration, public functions."""

import math

import torch
from torch import Tensor

from ..checks import check_kernel_dtype, check_real, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, kernel_op
from ..routing import runs_kernel
from ..tiling import ceil_div
from .config import BACKWARD, FORWARD, FlatConfig
from .reference import swiglu_ref, swiglu_tangent_ref

MOST = 16
"""Columns of a unit at most: two 16-byte accesses of 16 bits. A unit lies within a row."""


@once_a_kind
def _check(x: Tensor, tangents: tuple = (), *, tangent_start: int | None = None) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] % 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fail("x", got, "a tensor (B, ..., 2 h)", "lay the two products side by side")
    check_real("x", x)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_dtype("x", x)
    return kernel, check_tangents(("x",), (x,), tangents, tangent_start)[0]


def _unit(x: Tensor) -> int:
    """Columns of y that are one unit, for x (..., 2 h)."""
    return math.gcd(MOST, x.shape[-1] // 2)


def _units(x: Tensor) -> int:
    """Units of y."""
    return x.numel() // (2 * _unit(x))


def _launch(kernel, x: Tensor, args: dict, config: FlatConfig) -> Launch:
    """A launch over the elements of y, for x (..., 2 h)."""
    hidden = x.shape[-1] // 2
    return Launch(
        kernel=kernel,
        grid=(ceil_div(x.numel() // 2, config.block),),
        args={"x_ptr": x.contiguous(), "units": _units(x), **args},
        constexprs={"H": hidden, "UNIT": _unit(x), "BLOCK": config.block},
        num_warps=config.num_warps,
        num_stages=1,
    )


def forward_launch(
    x: Tensor, y: Tensor, x_dot: Tensor | None, y_dot: Tensor | None, tangent_start: int, config: FlatConfig = FORWARD
) -> Launch:
    """y from x; where x_dot is not None, y_dot too, of the samples from tangent_start on."""
    from .kernel import _swiglu_kernel

    args = {
        "y_ptr": y,
        "x_dot_ptr": None if x_dot is None else x_dot.contiguous(),
        "y_dot_ptr": y_dot,
        "tangent_start": tangent_start * (_units(x) // max(1, x.shape[0])),
        "tangent_units": 0 if x_dot is None else _units(x_dot),
    }
    return _launch(_swiglu_kernel, x, args, config)


def backward_launch(x: Tensor, dy: Tensor, dx: Tensor, config: FlatConfig = BACKWARD) -> Launch:
    """dx from x and dy."""
    from .kernel import _swiglu_bwd_kernel

    return _launch(_swiglu_bwd_kernel, x, {"dy_ptr": dy.contiguous(), "dx_ptr": dx}, config)


def _empty(x: Tensor) -> Tensor:
    """Room for y of x (..., 2 h)."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@kernel_op("meanflow_kernels::swiglu")
def _swiglu(x: Tensor) -> Launched[Tensor]:
    y = _empty(x)
    return y, (forward_launch, x, y, None, None, 0, FORWARD)


@kernel_op("meanflow_kernels::swiglu_jvp")
def _swiglu_jvp(x: Tensor, x_dot: Tensor, tangent_start: int) -> Launched[tuple[Tensor, Tensor]]:
    y, y_dot = _empty(x), _empty(x_dot)
    return (y, y_dot), (forward_launch, x, y, x_dot, y_dot, tangent_start, FORWARD)


@kernel_op("meanflow_kernels::swiglu_bwd")
def _swiglu_bwd(x: Tensor, dy: Tensor) -> Launched[Tensor]:
    dx = x.new_empty(x.shape)
    return dx, (backward_launch, x, dy, dx, BACKWARD)


differentiate(_swiglu, _swiglu_jvp, keep=lambda operands, y: (operands[:1], ()), backward=_swiglu_bwd)


def compile_cases(arch: int) -> list[CompileCase]:
    """The launch configs, at the hidden widths of the iMF family, for cross-compilation; one for all architectures."""
    cases = []
    for hidden in (2048, 2736):
        x = torch.empty(32, 276, 2 * hidden, dtype=torch.bfloat16, device="meta")
        y = _empty(x)
        launches = {
            "swiglu": (forward_launch(x, y, None, None, 0), FORWARD),
            "swiglu_jvp": (forward_launch(x, y, x, y, 0), FORWARD),
            "swiglu_bwd": (backward_launch(x, y, x), BACKWARD),
        }
        for op, (launch, config) in launches.items():
            cases.append(CompileCase(op, f"{config.block} w{config.num_warps}", x.dtype, hidden, launch))
    return cases


def swiglu(x: Tensor) -> Tensor:
    """y = silu(a) b with a and b the halves of x's last dimension (Shazeer, arXiv 2002.05202).

    Args:
        x: (B, ..., 2 h), any strides: the product with both weights, one beside the other; one that is not contiguous
            is copied. Computed in fp32 whatever its dtype (fp64 where x is fp64, which runs the reference alone).

    Returns:
        y (B, ..., h) in x's dtype. Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: x is no floating-point tensor of at least two dimensions, the last one even, or of a dtype the
            kernel does not take.
    """
    kernel, _ = _check(x)
    primals, tangents = unpack(x)
    if not absent(tangents):
        return pack(*swiglu_jvp(primals, tangents))
    if not kernel:
        return swiglu_ref(*once(*primals)).to(x.dtype)
    return _swiglu(*primals)


def swiglu_jvp(
    primals: tuple[Tensor], tangents: tuple[Tensor | None], *, tangent_start: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`swiglu` and its tangent silu'(a) a_dot b + silu(a) b_dot in one pass: (x,), (x_dot,) -> y, y_dot.

    Args:
        primals: x (B, ..., 2 h). tangents: x_dot (n, ..., 2 h), x's dtype; None is structurally zero.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, ..., h), and y_dot (n, ..., h) or None. Gradients flow through y to x; one asked of y_dot raises
        :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return swiglu(*primals), None
    (x,), (x_dot,) = primals, tangents
    kernel, tangent_start = _check(x, tangents, tangent_start=tangent_start)
    if kernel:
        return _swiglu_jvp(x, x_dot, tangent_start)
    with torch.no_grad():
        y_dot = swiglu_tangent_ref(*tangent_rows(primals, tangents, tangent_start), x_dot).to(x.dtype)
    return swiglu_ref(*once(x)).to(x.dtype), forbid_gradient(y_dot, x, x_dot)
