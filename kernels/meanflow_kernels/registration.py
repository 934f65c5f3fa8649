"""Registering an operator with torch, as ``torch.library.custom_op`` does but without its checks of every call.

Those look for results that alias the operands, and keep Dynamo out of a body that it never sees; ``opcheck`` looks for
the former once, in the tests.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple, get_args

import torch

from .dual import last, refuse_tangent_gradient
from .plans import run

Results = TypeVar("Results")
Tensors = TypeVarTuple("Tensors")
Launched = tuple[Results, tuple]
"""Room for an operator's results, and what fills it: the arguments of :func:`~meanflow_kernels.plans.run`."""

_library = torch.library.Library("meanflow_kernels", "FRAGMENT")


class Operator:
    """A registered operator: made by :func:`custom_op` or :func:`kernel_op`."""

    def __init__(self, name: str, body: Callable):
        self._name = name
        schema = torch.library.infer_schema(body, mutates_args=())
        _library.define(name.partition("::")[2] + schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "CompositeExplicitAutograd", body, lib=_library)
        self._overload = getattr(torch.ops.meanflow_kernels, name.partition("::")[2]).default

    def __call__(self, *operands: Any) -> Any:
        """Call it through torch, past its layer for gradients where none is recorded: that dispatches once more."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self._overload(*operands)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
            return self._overload(*operands)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*operands)

    def register_fake(self, fake: Callable) -> Callable:
        """Say what the results look like, as ``torch.library.register_fake``."""
        return torch.library.register_fake(self._name, fake, lib=_library)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Give the backward, as ``torch.library.register_autograd``."""
        torch.library.register_autograd(self._name, backward, setup_context=setup_context, lib=_library)


def custom_op(name: str) -> Callable[[Callable], Operator]:
    """Register the decorated function, whose annotations are the schema, as the operator ``meanflow_kernels::name``.

    It runs on every device, without autograd, and mutates nothing; no result may alias an operand.
    """
    return lambda body: Operator(name, body)


def kernel_op(name: str) -> Callable[[Callable[..., Launched]], Operator]:
    """:func:`custom_op` of what Triton kernels fill: the decorated function makes room and launches nothing itself.

    The schema is that of its arguments and of the results in its :data:`Launched`. Of fake tensors the room is all.
    """

    def register(body: Callable[..., Launched]) -> Operator:
        def operator(*operands):
            results, launch = body(*operands)
            run(*launch)
            return results

        signature = inspect.signature(body)
        results, _ = get_args(signature.return_annotation)
        operator.__signature__ = signature.replace(return_annotation=results)
        registered = Operator(name, operator)
        registered.register_fake(lambda *operands: body(*operands)[0])
        return registered

    return register


def empty_like(*tensors: *Tensors) -> tuple[*Tensors]:
    """Room for results of these shapes and dtypes, contiguous whatever the tensors' strides are."""
    rooms: Any = tuple(x.new_empty(x.shape) for x in tensors)
    return rooms


def differentiate(*operators: Operator, keep: Callable, backward: Callable, results: int = 1) -> None:
    """Give a backward to an operator and to its ``_jvp``, whose tangents are neither kept nor differentiated.

    Args:
        keep: makes of the operands and the result what the backward needs: tensors, and in a second tuple numbers.
        backward: makes of those tensors, the cotangents of the first results and those numbers the gradients of the
            first operands. Not all of the cotangents are None.
        results: how many results are primal.
    """

    def save(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        tensors, ctx.numbers = keep(inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.inputs = len(inputs)

    def gradients(ctx, *cotangents):
        primal, tangent = cotangents[:results], cotangents[results:]
        refuse_tangent_gradient(*tangent)
        grads = ()
        if any(x is not None for x in primal):
            grads = backward(*ctx.saved_tensors, *primal, *ctx.numbers)
            grads = last(*(grads if isinstance(grads, tuple) else (grads,)))
        return (*grads, *[None] * (ctx.inputs - len(grads)))

    for operator in operators:
        operator.register_autograd(gradients, setup_context=save)
