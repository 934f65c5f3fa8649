"""Linear layer on (primal, tangent) pairs: bias on the primal only, and only the primal is differentiated.

The products are torch's, so they follow autocast, compile like any other and are seen by torch's FLOP counter.

Two products, not one of all rows: the weight is fetched a second time, which at a few hundred rows and more is nothing
beside them. Each result is a tensor of its own, so that autograd, which keeps the primal, does not keep the tangent.
"""

import torch
from torch import Tensor

from ..checks import check_alike, check_real, check_shape, check_tangents, fail
from ..dual import absent, forbid_gradient, last, pack, unpack
from ..registration import custom_op
from ..transforms import check_pair_transforms, tracked


def _autocast(x: Tensor) -> bool:
    # torch has no autocast for meta tensors, and says so by raising
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_shape("weight", weight, (None, None), "(C, K)")
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        fail("x", got, f"(..., K) with the weight's K = {weight.shape[1]}", "nothing is broadcast")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(C,)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_real(name, tensor)
    # autocast brings the dtypes together
    check_alike(("x", "weight", "bias"), (x, weight, bias), dtype=not _autocast(x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias.

    Args:
        x: (..., K). weight: (C, K). bias: (C,) or None. One dtype and device.

    Returns:
        y (..., C). Under forward-mode AD it carries its tangent, whichever of the three carry one.

    Raises:
        ValueError: a shape, dtype or device that does not fit, by the argument's name.
    """
    _check(x, weight, bias)
    return torch.nn.functional.linear(*map(pack, *unpack(x, weight, bias)))  # tangents in their primals' dtype


def linear_jvp(
    primals: tuple[Tensor], tangents: tuple[Tensor | None], weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`linear` and its tangent: (x,), (x_dot,), weight, bias -> y = x weight^T + bias, y_dot = x_dot weight^T.

    Args:
        primals: x (B, ..., K). tangents: x_dot (n, ..., K) with n <= B, x's dtype; None is structurally zero. Rows do
            not mix, so it does not matter which samples the tangent belongs to.
        weight: (C, K). bias: (C,) or None. Parameters: they have no tangent.

    Returns:
        y (B, ..., C), and y_dot (n, ..., C) or None. Gradients flow through y to x, weight and bias, for which x and
        weight are saved; one asked of y_dot raises :class:`~meanflow_kernels.dual.TangentGradientError`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a weight or bias that carries a tangent of its own.
    """
    if absent(tangents):
        return linear(*primals, weight, bias), None
    (x,), (x_dot,) = primals, tangents
    _check(x, weight, bias)
    check_tangents(("x",), primals, tangents, 0)
    check_pair_transforms(("weight", "bias"), (weight, bias), (None, None))
    with torch.no_grad():
        y_dot = torch.nn.functional.linear(x_dot, weight)
    return torch.nn.functional.linear(x, weight, bias), forbid_gradient(y_dot, x, x_dot, weight)


@custom_op("meanflow_kernels::join")
def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, -1)


@_join.register_fake
def _(parts):
    return torch.cat(parts, -1)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(x, parts):
        return x.chunk(parts, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return last(_join(list(grads)))[0], None


@torch.compiler.allow_in_graph
def _chunks(x, parts):
    return _Chunks.apply(x, parts)


def chunks(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """x (..., parts C) as so many views (..., C), whose gradients are put side by side by one call of torch.cat.

    torch.chunk says the same, but a compiled backward copies each gradient by a kernel of its own.

    Raises:
        ValueError: a width that is no multiple of parts.
    """
    if x.shape[-1] % parts:
        fail("parts", parts, f"a divisor of x's width {x.shape[-1]}", "pass the number of equal parts")
    return _chunks(x, parts) if torch.is_grad_enabled() and tracked(x) else x.chunk(parts, -1)
