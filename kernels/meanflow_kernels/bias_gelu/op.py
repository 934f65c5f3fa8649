"""Bias + tanh-GELU on (primal, tangent) pairs: checks, launches, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_alike, check_kernel_dtype, check_real, check_shape, check_tangents, fail
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..tiling import StripConfig, TileConfig, ceil_div
from .config import BACKWARD, FORWARD, SUMS
from .reference import bias_gelu_ref, bias_gelu_tangent_ref


@once_a_kind
def _check(x: Tensor, bias: Tensor, tangents: tuple = (), *, tangent_start: int | None = None) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fail("x", got, "a tensor (B, ..., C)", "unsqueeze it")
    check_shape("bias", bias, (x.shape[-1],), "(C,)")
    check_alike(("x", "bias"), (x, bias), dtype=False)
    check_real("x", x)
    check_real("bias", bias)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_dtype("x", x)
        check_kernel_dtype("bias", bias)
    return kernel, check_tangents(("x",), (x,), tangents, tangent_start)[0]


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _grid(rows: int, width: int, rows_per_chunk: int, config: TileConfig) -> tuple[int]:
    return (ceil_div(rows, rows_per_chunk) * ceil_div(width, config.block_c),)


def _tile(width: int, config: TileConfig) -> dict[str, int]:
    return {"C": width, "BLOCK_R": config.block_r, "BLOCK_C": config.block_c}


def forward_launch(
    x: Tensor,
    bias: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    tangent_start: int,
    config: TileConfig = FORWARD,
) -> Launch:
    """y from x and bias; where x_dot is not None, y_dot too, of the samples from tangent_start on."""
    from .kernel import _bias_gelu_kernel

    rows, width = _rows(x), x.shape[-1]
    return Launch(
        kernel=_bias_gelu_kernel,
        grid=_grid(rows, width, config.block_r, config),
        args={
            "x_ptr": x.contiguous(),
            "bias_ptr": bias.contiguous(),
            "y_ptr": y,
            "x_dot_ptr": None if x_dot is None else x_dot.contiguous(),
            "y_dot_ptr": y_dot,
            "rows": rows,
            "tangent_start": tangent_start * (rows // max(1, x.shape[0])),
            "tangent_rows": 0 if x_dot is None else _rows(x_dot),
        },
        constexprs=_tile(width, config),
        num_warps=config.num_warps,
        num_stages=1,
    )


def backward_launches(
    x: Tensor,
    bias: Tensor,
    dy: Tensor,
    dx: Tensor,
    dbias: Tensor,
    config: StripConfig = BACKWARD,
    sums_config: TileConfig = SUMS,
) -> tuple[Launch, Launch]:
    """dx and each program's sums, then dbias from those."""
    from ..partials import sum_partials
    from .kernel import _bias_gelu_bwd_kernel

    rows, width = _rows(x), x.shape[-1]
    rows_per_chunk = config.rows_per_program(ceil_div(width, config.block_c), rows, x.device)
    partial = x.new_empty((1, ceil_div(rows, rows_per_chunk), width), dtype=torch.float32)
    first = Launch(
        kernel=_bias_gelu_bwd_kernel,
        grid=_grid(rows, width, rows_per_chunk, config),
        args={
            "x_ptr": x.contiguous(),
            "bias_ptr": bias.contiguous(),
            "dy_ptr": dy.contiguous(),
            "dx_ptr": dx,
            "partial_ptr": partial,
            "rows": rows,
            "rows_per_chunk": rows_per_chunk,
        },
        constexprs=_tile(width, config),
        num_warps=config.num_warps,
        num_stages=1,
        scratch=partial,
    )
    return first, sum_partials(partial, [dbias[None]], sums_config)


@kernel_op("meanflow_kernels::bias_gelu")
def _bias_gelu(x: Tensor, bias: Tensor) -> Launched[Tensor]:
    y = x.new_empty(x.shape)
    return y, (forward_launch, x, bias, y, None, None, 0, FORWARD)


@kernel_op("meanflow_kernels::bias_gelu_jvp")
def _bias_gelu_jvp(x: Tensor, bias: Tensor, x_dot: Tensor, tangent_start: int) -> Launched[tuple[Tensor, Tensor]]:
    y, y_dot = empty_like(x, x_dot)
    return (y, y_dot), (forward_launch, x, bias, y, x_dot, y_dot, tangent_start, FORWARD)


@kernel_op("meanflow_kernels::bias_gelu_bwd")
def _bias_gelu_bwd(x: Tensor, bias: Tensor, dy: Tensor) -> Launched[tuple[Tensor, Tensor]]:
    dx, dbias = empty_like(x, bias)
    return (dx, dbias), (backward_launches, x, bias, dy, dx, dbias, BACKWARD, SUMS)


differentiate(
    _bias_gelu,
    _bias_gelu_jvp,
    keep=lambda operands, y: (operands[:2], ()),
    backward=_bias_gelu_bwd,
)


def compile_cases(arch: int) -> list[CompileCase]:
    """The launch configs, at the hidden width of the largest DiT, for cross-compilation; one for all architectures."""
    x, bias = torch.empty(32, 256, 4608, dtype=torch.bfloat16, device="meta"), torch.empty(4608, device="meta")
    launches = {
        "bias_gelu": forward_launch(x, bias, x, None, None, 0),
        "bias_gelu_jvp": forward_launch(x, bias, x, x, x, 0),
    }
    launches["bias_gelu_bwd"], launches["bias_gelu_bwd sums"] = backward_launches(x, bias, x, x, bias)
    configs = (FORWARD, FORWARD, BACKWARD, SUMS)
    return [
        CompileCase(op, f"{t.block_r}x{t.block_c} w{t.num_warps}", x.dtype, 4608, launch)
        for (op, launch), t in zip(launches.items(), configs, strict=True)
    ]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """y = gelu_tanh(x + bias) in x's dtype, computed in fp32 (fp64 where x is fp64, which runs the reference alone).

    Args:
        x: (B, ..., C), any strides; one that is not contiguous is copied. bias: (C,), of any dtype the kernel takes.

    Returns:
        y like x, contiguous. Under forward-mode AD it carries its tangent, the bias's share included.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, _ = _check(x, bias)
    (x, bias), (x_dot, bias_dot) = unpack(x, bias)
    if bias_dot is not None:
        # the bias enters as x does
        bias_dot = bias_dot.to(x.dtype)
        x_dot = bias_dot.expand_as(x) if x_dot is None else x_dot + bias_dot
    if x_dot is not None:
        return pack(*bias_gelu_jvp((x,), (x_dot,), bias))
    if not kernel:
        return bias_gelu_ref(*once(x, bias)).to(x.dtype)
    return _bias_gelu(x, bias)


def bias_gelu_jvp(
    primals: tuple[Tensor], tangents: tuple[Tensor | None], bias: Tensor, *, tangent_start: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`bias_gelu` and its tangent gelu_tanh'(x + bias) x_dot in one pass: (x,), (x_dot,), bias -> y, y_dot.

    Args:
        primals: x (B, ..., C). tangents: x_dot (n, ..., C), x's dtype; None is structurally zero.
        bias: (C,), a parameter: it has no tangent.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y like x, and y_dot like x_dot, or None. Gradients flow through y to x and bias; one asked of y_dot raises
        :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return bias_gelu(*primals, bias), None
    (x,), (x_dot,) = primals, tangents
    kernel, tangent_start = _check(x, bias, tangents, tangent_start=tangent_start)
    if kernel:
        return _bias_gelu_jvp(x, bias, x_dot, tangent_start)
    with torch.no_grad():
        y_dot = bias_gelu_tangent_ref(*tangent_rows(primals, tangents, tangent_start), bias, x_dot).to(x.dtype)
    return bias_gelu_ref(*once(x, bias)).to(x.dtype), forbid_gradient(y_dot, x, bias, x_dot)
