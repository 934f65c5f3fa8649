"""RMSNorm on (primal, tangent) pairs: checks, launches, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_alike, check_parameter, check_real, check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..rows.config import RowConfig
from ..rows.launch import IMF_WIDTHS, check_kernel_row, partial_sums, row_cases, row_launch
from ..tiling import TileConfig
from .config import BACKWARD, FORWARD, SUMS
from .reference import rmsnorm_ref, rmsnorm_tangent_ref

_NAMES = ("x", "weight")


@once_a_kind
def _check(
    x: Tensor,
    weight: Tensor,
    tangents: tuple = (),
    *,
    out_dtype: torch.dtype | None,
    tangent_start: int | None = None,
) -> tuple[bool, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, and where the tangent begins."""
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_shape("weight", weight, (x.shape[2],), "(C,)")
    check_alike(_NAMES, (x, weight), dtype=False)
    for name, tensor in zip(_NAMES, (x, weight), strict=True):
        check_real(name, tensor)
    check_parameter("weight", weight)
    start, _ = check_tangents(("x",), (x,), tangents, tangent_start)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_row(x, _NAMES, (x, weight), out_dtype or x.dtype)
    return kernel, start


def forward_launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    x_dot: Tensor | None,
    y_dot: Tensor | None,
    tangent_start: int,
    eps: float,
    config: RowConfig = FORWARD,
) -> Launch:
    """y of x and weight, and y_dot of the samples from tangent_start on, where it is not None."""
    from .kernel import _rmsnorm_kernel

    return row_launch(
        _rmsnorm_kernel,
        config,
        rows={"x": x, "x_dot": x_dot},
        vectors={},
        contiguous={"weight": weight.contiguous(), "y": y, "y_dot": y_dot},
        scalars={"tangent_start": tangent_start, "tangent_samples": 0 if y_dot is None else y_dot.shape[0], "eps": eps},
    )


def backward_launches(
    x, weight, dy, dx, dweight, eps: float, config: RowConfig = BACKWARD, sums_config: TileConfig = SUMS
) -> tuple[Launch, Launch]:
    """dx and each program's sums, then dweight from those."""
    from ..partials import sum_partials
    from .kernel import _rmsnorm_bwd_kernel

    partial = partial_sums(1, x, config)
    first = row_launch(
        _rmsnorm_bwd_kernel,
        config,
        rows={"x": x, "dy": dy},
        vectors={},
        contiguous={"weight": weight.contiguous(), "dx": dx, "partial": partial},
        scalars={"eps": eps},
        scratch=partial,
    )
    return first, sum_partials(partial, [dweight[None]], sums_config)


@kernel_op("meanflow_kernels::rmsnorm")
def _rmsnorm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Launched[Tensor]:
    y = x.new_empty(x.shape, dtype=out_dtype)
    return y, (forward_launch, x, weight, y, None, None, 0, eps, FORWARD)


@kernel_op("meanflow_kernels::rmsnorm_jvp")
def _rmsnorm_jvp(
    x: Tensor, weight: Tensor, x_dot: Tensor, tangent_start: int, eps: float, out_dtype: torch.dtype
) -> Launched[tuple[Tensor, Tensor]]:
    y, y_dot = x.new_empty(x.shape, dtype=out_dtype), x_dot.new_empty(x_dot.shape, dtype=out_dtype)
    return (y, y_dot), (forward_launch, x, weight, y, x_dot, y_dot, tangent_start, eps, FORWARD)


@kernel_op("meanflow_kernels::rmsnorm_bwd")
def _rmsnorm_bwd(x: Tensor, weight: Tensor, dy: Tensor, eps: float) -> Launched[tuple[Tensor, Tensor]]:
    grads = empty_like(x, weight)
    return grads, (backward_launches, x, weight, dy, *grads, eps, BACKWARD, SUMS)


differentiate(
    _rmsnorm,
    _rmsnorm_jvp,
    keep=lambda operands, y: (operands[:2], operands[-2:-1]),  # x and weight, and eps
    backward=_rmsnorm_bwd,
)


def _launches(x: Tensor, y: Tensor, vector: Tensor) -> dict[str, Launch]:
    weight = x.new_empty(x.shape[2])
    backward, sums = backward_launches(x, weight, y, x, weight, 1e-6)
    return {
        "rmsnorm": forward_launch(x, weight, y, None, None, 0, 1e-6),
        "rmsnorm_jvp": forward_launch(x, weight, y, x, y, 0, 1e-6),
        "rmsnorm_bwd": backward,
        "rmsnorm_bwd sums": sums,
    }


def compile_cases(arch: int) -> list[CompileCase]:
    """Every launch config, for cross-compilation; one for all architectures."""
    return row_cases(_launches, IMF_WIDTHS)


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None) -> Tensor:
    """y = weight x / sqrt(mean(x^2) + eps), the mean over C (Zhang & Sennrich, arXiv 1910.07467).

    Args:
        x: (B, L, C), any strides; one whose last is not 1 is copied. Statistics are fp32 whatever its dtype (fp64 where
            x is fp64, which runs the reference alone).
        weight: (C,), a parameter, of any dtype: it has no tangent.
        eps: added to the mean square. out_dtype: dtype of y, default x's.

    Returns:
        y (B, L, C). Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, _ = _check(x, weight, out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    primals, tangents = unpack(x)
    if not absent(tangents):
        return pack(*rmsnorm_jvp(primals, tangents, weight, eps=eps, out_dtype=out_dtype))
    if not kernel:
        return rmsnorm_ref(*once(*primals, weight), eps=eps).to(out_dtype)
    return _rmsnorm(*primals, weight, eps, out_dtype)


def rmsnorm_jvp(
    primals: tuple[Tensor],
    tangents: tuple[Tensor | None],
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rmsnorm` and its tangent in one pass: (x,), (x_dot,), weight -> y, y_dot.

    Args:
        primals: x (B, L, C). tangents: x_dot (n, L, C), x's dtype; None is structurally zero.
        weight, eps, out_dtype: as for :func:`rmsnorm`.
        tangent_start: the tangent belongs to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, L, C) and y_dot (n, L, C), both in out_dtype; (y, None) where the tangent is None. Gradients flow through
        y to x and weight; one asked of y_dot raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return rmsnorm(*primals, weight, eps=eps, out_dtype=out_dtype), None
    (x,), (x_dot,) = primals, tangents
    kernel, tangent_start = _check(x, weight, tangents, out_dtype=out_dtype, tangent_start=tangent_start)
    out_dtype = out_dtype or x.dtype
    if kernel:
        return _rmsnorm_jvp(x, weight, x_dot, tangent_start, eps, out_dtype)
    with torch.no_grad():
        y_dot = rmsnorm_tangent_ref(*tangent_rows(primals, tangents, tangent_start), weight, x_dot, eps=eps).to(
            out_dtype
        )
    return rmsnorm_ref(*once(x, weight), eps=eps).to(out_dtype), forbid_gradient(y_dot, x, weight, x_dot)
