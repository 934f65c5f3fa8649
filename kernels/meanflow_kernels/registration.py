"""Registering an operator with torch, as ``torch.library.custom_op`` does but without its checks of every call.

Those look for results that alias the operands, and keep Dynamo out of a body that it never sees; ``opcheck`` looks for
the former once, in the tests.
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("meanflow_kernels", "FRAGMENT")


class Operator:
    """A registered operator: made by :func:`custom_op`."""

    def __init__(self, name: str, body: Callable):
        self._name = name
        schema = torch.library.infer_schema(body, mutates_args=())
        _library.define(name.partition("::")[2] + schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "CompositeExplicitAutograd", body, lib=_library)

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
