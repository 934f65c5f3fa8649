"""Linear layer on (primal, tangent) pairs: bias on the primal only, and only the primal is differentiated.

The products are torch's, so they follow autocast, compile like any other and are seen by torch's FLOP counter.

Two products or one: the weight is fetched a second time by a second product, but at a few hundred rows and more that
is nothing beside the rows. So two are the rule, each with the bias where it belongs, in the product's epilogue, and
each with a result of its own: a result that holds primal and tangent would keep the tangent alive as long as autograd
keeps the primal, and double the saved memory. Where x and x_dot do lie in one buffer, one after the other, one product
of twice the rows fills the device better, and nothing is copied: then y and y_dot come as views of one buffer too, for
the next linear to find. A caller who stacks them decides so (few rows, or no backward). A compiled region always has
two products: what lies next to what is not known to the tracer.
"""

import torch
from torch import Tensor

from ..checks import check_alike, check_real, check_shape, check_tangents, fail
from ..dual import absent, guard, refuse_tangent_gradient, settled
from ..transforms import check_pair_transforms


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


def _stacked(x: Tensor, x_dot: Tensor) -> Tensor | None:
    """Rows of x and then of x_dot as one matrix, where they are views of one buffer, one after the other; else None."""
    # autocast would copy each of them
    if torch.compiler.is_compiling() or _autocast(x) or x.numel() == 0:
        return None
    if x._base is None or x._base is not x_dot._base:
        return None
    if not (x.is_contiguous() and x_dot.is_contiguous() and x_dot.storage_offset() == x.storage_offset() + x.numel()):
        return None
    width = x.shape[-1]
    return x.detach().as_strided(((x.numel() + x_dot.numel()) // width, width), (width, 1))


class _StackedLinear(torch.autograd.Function):
    """One product of primal and tangent rows; saves and differentiates the primal alone."""

    @staticmethod
    def forward(x, x_dot, stacked, weight, bias):
        out = stacked @ weight.t()
        rows = x.numel() // x.shape[-1]
        y, y_dot = out[:rows].view(*x.shape[:-1], -1), out[rows:].view(*x_dot.shape[:-1], -1)
        if bias is not None:
            y += bias
        return y, y_dot

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, _, weight, bias = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, dy, dy_dot):
        refuse_tangent_gradient(dy_dot)
        if dy is None:
            return (None,) * 5
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dweight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[3] else None
        dbias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
        return dx, None, None, dweight, dbias


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
    return torch.nn.functional.linear(*settled(x, weight, bias))


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
        Where x and x_dot are adjacent views of one buffer, y and y_dot are too, of one product.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a weight or bias that carries a tangent of its own.
    """
    if absent(tangents):
        return linear(*primals, weight, bias), None
    (x,), (x_dot,) = primals, tangents
    _check(x, weight, bias)
    check_tangents(("x",), primals, tangents, 0)
    check_pair_transforms(("weight", "bias"), (weight, bias), (None, None))
    stacked = _stacked(x, x_dot)
    if stacked is not None:
        return _StackedLinear.apply(x, x_dot, stacked, weight, bias)
    with torch.no_grad():
        y_dot = torch.nn.functional.linear(x_dot, weight)
    return torch.nn.functional.linear(x, weight, bias), guard(y_dot, x, x_dot, weight)
