"""Argument checks: every failure is a ValueError that names the argument, what it got, what it wants and what to do.

All helpers are traceable by Dynamo and accept symbolic sizes; ``name`` is the argument's name as the caller wrote it.
"""

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .transforms import check_pair_transforms, may_be_dual

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)


def fail(name: str, got: object, wanted: object, remedy: str) -> None:
    """Raise the ValueError of this package's one form."""
    raise ValueError(f"{name}: got {got}, wanted {wanted}; {remedy}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None], letters: str) -> None:
    """``x`` has ``shape``, where None stands for any size; ``letters`` is its legend, such as "(B, L, C)"."""
    if not isinstance(x, Tensor):
        fail(name, f"a {type(x).__name__}", f"a tensor {letters}", "pass a tensor")
    if x.dim() == len(shape):
        for size, wanted in zip(x.shape, shape, strict=True):
            if wanted is not None and size != wanted:
                break
        else:
            return
    sizes = ", ".join("any" if s is None else str(s) for s in shape)
    fail(name, f"shape {tuple(x.shape)}", f"{letters} = ({sizes})", "reshape or expand it; nothing is broadcast")


def check_alike(names: Sequence[str], tensors: Sequence[Tensor | None], *, dtype: bool = True) -> None:
    """Every tensor that is not None shares the first one's device and, unless ``dtype=False``, its dtype."""
    first = tensors[0]
    for name, x in zip(names[1:], tensors[1:], strict=True):
        if x is None:
            continue
        if x.device != first.device:
            fail(
                name,
                f"device {x.device}",
                f"{first.device}, the device of {names[0]}",
                f"move it with .to({first.device})",
            )
        if dtype and x.dtype != first.dtype:
            fail(name, x.dtype, f"{first.dtype}, the dtype of {names[0]}", f"cast it with .to({first.dtype})")


def check_real(name: str, x: Tensor) -> None:
    """``x`` has a dtype that an operator takes on either route; float64 runs the reference alone."""
    if x.dtype not in DTYPES:
        fail(name, x.dtype, "bfloat16, float16, float32 or float64", "cast it: derivatives need real numbers")


def check_interpreted(name: str, x: Tensor) -> None:
    """``x`` has a dtype that Triton's interpreter multiplies rightly: its ``tl.dot`` takes bf16 for integers."""
    if x.dtype != torch.bfloat16 or x.is_cuda:
        return
    import triton

    if triton.knobs.runtime.interpret:
        fail(
            name,
            f"{x.dtype} on {x.device}",
            "float16 or float32 in Triton's interpreter",
            "cast it, or use force_route(Route.REFERENCE)",
        )


def check_kernel_dtype(name: str, x: Tensor) -> None:
    """``x`` has a dtype that the Triton kernels take: bf16, fp16 or fp32."""
    if x.dtype not in KERNEL_DTYPES:
        fail(
            name,
            x.dtype,
            "bfloat16, float16 or float32",
            "cast it, or use force_route(Route.REFERENCE), which takes float64",
        )


def check_parameter(name: str, x: Tensor) -> None:
    """``x`` carries no tangent of its own, which the operator would drop."""
    if may_be_dual() and forward_ad.unpack_dual(x).tangent is not None:
        remedy = "use the *_ref function of the operator's reference.py, plain torch, which carries any"
        fail(name, "a tensor with a forward-mode tangent", "a parameter without one", remedy)


def check_tangents(
    names: Sequence[str], primals: Sequence[Tensor], tangents: Sequence[Tensor | None], tangent_start: int | None
) -> tuple[int, int]:
    """Each tangent matches its primal (dtype, device, all sizes but the batch), and all cover the same samples.

    ``names`` are the primals' names; every primal is batched along dim 0 and at least one tangent is not None, or there
    is an empty tuple of them. None of them may be a forward-mode dual (see ``transforms``). Returns (start, n): the
    tangents belong to samples start .. start + n of the primals.
    """
    if not tangents:
        return 0, 0
    if len(tangents) != len(primals):
        fail(
            "tangents",
            f"{len(tangents)} entries",
            f"{len(primals)}, one a primal",
            "pass None for a tangent that is zero",
        )
    check_pair_transforms(names, primals, tangents)
    n = next(x.shape[0] for x in tangents if x is not None)
    for name, x, x_dot in zip(names, primals, tangents, strict=True):
        if x_dot is None:
            continue
        if x_dot.dtype != x.dtype or x_dot.device != x.device:
            got, wanted = f"{x_dot.dtype} on {x_dot.device}", f"{x.dtype} on {x.device}, as {name}"
            fail(f"{name}_dot", got, wanted, f"convert it with .to({name})")
        if x_dot.shape[1:] != x.shape[1:] or x_dot.shape[0] != n:
            check_shape(f"{name}_dot", x_dot, (n, *x.shape[1:]), f"{name}'s shape with the tangents' batch")
    batch = primals[0].shape[0]
    if tangent_start is None and n != batch:
        remedy = "pass tangent_start=s if the tangents belong to samples s, s + 1, ... only"
        fail(f"{names[0]}_dot", f"a tangent batch of {n}", f"{batch}, the primal batch", remedy)
    start = 0 if tangent_start is None else tangent_start
    if start < 0 or start + n > batch:
        remedy = "0 for a leading slice, B - n for a trailing one"
        fail("tangent_start", f"{start} with a tangent batch of {n}", f"0 <= tangent_start <= {batch} - {n}", remedy)
    return start, n
