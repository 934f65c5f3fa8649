"""LayerNorm + modulate on (primal, tangent) pairs: checks, launches, registration, public functions."""

import torch
from torch import Tensor

from ..checks import check_shape, check_tangents
from ..dual import absent, forbid_gradient, once, pack, tangent_rows, unpack
from ..kinds import once_a_kind
from ..launch import CompileCase, Launch
from ..registration import Launched, differentiate, empty_like, kernel_op
from ..routing import runs_kernel
from ..rows.config import RowConfig
from ..rows.launch import check_kernel_row, check_vectors, partial_sums, row_cases, row_launch
from ..tiling import TileConfig
from .config import BACKWARD, FORWARD, SUMS
from .reference import adaln_ref, adaln_tangent_ref

_NAMES = ("x", "shift", "scale")


@once_a_kind
def _check(
    primals: tuple, tangents: tuple = (), *, out_dtype: torch.dtype | None, tangent_start: int | None = None
) -> tuple[bool, int, int]:
    """Shapes, dtypes and devices; returns whether the kernel runs, where the tangents begin, and how many they are."""
    x, *vectors = primals
    check_shape("x", x, (None, None, None), "(B, L, C)")
    check_vectors(x, _NAMES[1:], vectors)
    start, n = check_tangents(_NAMES, primals, tangents, tangent_start)
    kernel = runs_kernel(x)
    if kernel:
        check_kernel_row(x, _NAMES, primals, out_dtype or x.dtype)
    return kernel, start, n


def forward_launch(
    x, shift, scale, y, x_dot, shift_dot, scale_dot, y_dot, tangent_start: int, eps: float, config: RowConfig = FORWARD
) -> Launch:
    """y of x, shift and scale, and y_dot of the samples from tangent_start on, where it is not None."""
    from .kernel import _adaln_kernel

    return row_launch(
        _adaln_kernel,
        config,
        rows={"x": x, "x_dot": x_dot},
        vectors={"shift": shift, "scale": scale, "shift_dot": shift_dot, "scale_dot": scale_dot},
        contiguous={"y": y, "y_dot": y_dot},
        scalars={"tangent_start": tangent_start, "tangent_samples": 0 if y_dot is None else y_dot.shape[0], "eps": eps},
    )


def backward_launches(
    x, scale, dy, dx, dshift, dscale, eps: float, config: RowConfig = BACKWARD, sums_config: TileConfig = SUMS
) -> tuple[Launch, Launch]:
    """dx and each program's sums, then dshift and dscale from those."""
    from ..partials import sum_partials
    from .kernel import _adaln_bwd_kernel

    partial = partial_sums(2, x, config)
    first = row_launch(
        _adaln_bwd_kernel,
        config,
        rows={"x": x, "dy": dy},
        vectors={"scale": scale},
        contiguous={"dx": dx, "partial": partial},
        scalars={"eps": eps},
        scratch=partial,
    )
    return first, sum_partials(partial, [dshift, dscale], sums_config)


@kernel_op("meanflow_kernels::adaln")
def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> Launched[Tensor]:
    y = x.new_empty(x.shape, dtype=out_dtype)
    return y, (forward_launch, x, shift, scale, y, None, None, None, None, 0, eps, FORWARD)


@kernel_op("meanflow_kernels::adaln_jvp")
def _adaln_jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    tangent_start: int,
    tangent_samples: int,
    eps: float,
    out_dtype: torch.dtype,
) -> Launched[tuple[Tensor, Tensor]]:
    y = x.new_empty(x.shape, dtype=out_dtype)
    y_dot = x.new_empty((tangent_samples, *x.shape[1:]), dtype=out_dtype)
    operands = (x, shift, scale, y, x_dot, shift_dot, scale_dot, y_dot, tangent_start, eps)
    return (y, y_dot), (forward_launch, *operands, FORWARD)


@kernel_op("meanflow_kernels::adaln_bwd")
def _adaln_bwd(x: Tensor, scale: Tensor, dy: Tensor, eps: float) -> Launched[tuple[Tensor, Tensor, Tensor]]:
    grads = empty_like(x, scale, scale)
    return grads, (backward_launches, x, scale, dy, *grads, eps, BACKWARD, SUMS)


differentiate(
    _adaln,
    _adaln_jvp,
    keep=lambda operands, y: (operands[:3:2], operands[-2:-1]),  # x and scale, and eps
    backward=_adaln_bwd,
)


def _launches(x: Tensor, y: Tensor, vector: Tensor) -> dict[str, Launch]:
    dshift, dscale = (vector.new_empty(vector.shape) for _ in range(2))
    backward, sums = backward_launches(x, vector, y, x, dshift, dscale, 1e-6)
    return {
        "adaln": forward_launch(x, vector, vector, y, None, None, None, None, 0, 1e-6),
        "adaln_jvp": forward_launch(x, vector, vector, y, x, vector, vector, y, 0, 1e-6),
        "adaln_bwd": backward,
        "adaln_bwd sums": sums,
    }


def compile_cases(arch: int) -> list[CompileCase]:
    """Every launch config, for cross-compilation; one for all architectures."""
    return row_cases(_launches)


def adaln(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """y = LayerNorm(x) (1 + scale) + shift: the adaptive LayerNorm of DiT (Peebles & Xie, arXiv 2212.09748), no affine.

    Args:
        x: (B, L, C). Statistics are fp32 whatever its dtype (fp64 where x is fp64, which runs the reference alone).
        shift, scale: (B, C), of one dtype, which may differ from x's. Chunks of a (B, 6 C) projection are read in
            place; of all arguments only one whose last stride is not 1 is copied.
        eps: added to the variance. out_dtype: dtype of y, default x's.

    Returns:
        y (B, L, C), contiguous. Under forward-mode AD it carries its tangent.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    kernel, *_ = _check((x, shift, scale), out_dtype=out_dtype)
    out_dtype = out_dtype or x.dtype
    primals, tangents = unpack(x, shift, scale)
    if not absent(tangents):
        return pack(*adaln_jvp(primals, tangents, eps=eps, out_dtype=out_dtype))
    if not kernel:
        return adaln_ref(*once(*primals), eps=eps).to(out_dtype)
    return _adaln(*primals, eps, out_dtype)


def adaln_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    tangent_start: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`adaln` and its tangent in one pass: (x, shift, scale), (x_dot, shift_dot, scale_dot) -> y, y_dot.

    Args:
        primals: as for :func:`adaln`.
        tangents: each shaped like its primal but for the batch n, in its dtype; None is structurally zero.
        tangent_start: the tangents belong to samples tangent_start .. tangent_start + n; None: to all, n = B.

    Returns:
        y (B, L, C) and y_dot (n, L, C), both in out_dtype; (y, None) where every tangent is None. Gradients flow
        through y to the primals; one asked of y_dot raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    if absent(tangents):
        return adaln(*primals, eps=eps, out_dtype=out_dtype), None
    kernel, tangent_start, n = _check(primals, tangents, out_dtype=out_dtype, tangent_start=tangent_start)
    out_dtype = out_dtype or primals[0].dtype
    if kernel:
        return _adaln_jvp(*primals, *tangents, tangent_start, n, eps, out_dtype)
    y = adaln_ref(*once(*primals), eps=eps).to(out_dtype)
    with torch.no_grad():
        y_dot = adaln_tangent_ref(tangent_rows(primals, tangents, tangent_start), tangents, eps=eps).to(out_dtype)
    return y, forbid_gradient(y_dot, *primals, *tangents)
