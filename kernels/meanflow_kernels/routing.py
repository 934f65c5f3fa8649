"""Which implementation serves a call: CUDA tensors the Triton kernel, all others the reference.

``force_route`` overrides that for a scope:

    with force_route(Route.REFERENCE):       # plain torch on any device, any real dtype up to fp64
        ...
    with force_route(Route.TRITON):          # the kernel; on CPU tensors in Triton's interpreter
        ...

An op asks :func:`runs_kernel` once, in Python, before it dispatches. Under ``torch.compile`` the answer is baked into
the graph and guarded: a compiled function called under another forced route recompiles, and the scope works inside the
compiled region too. The override is one value for the process, not for a thread, because Dynamo guards neither context
variables nor thread locals. Fake and meta tensors follow the same rule, so a step can be accounted without running it.
"""

import contextlib
import enum
import importlib.util
from collections.abc import Iterator

from torch import Tensor

from .transforms import check_transforms


class Route(enum.Enum):
    """An implementation that can serve a call."""

    REFERENCE = "reference"
    TRITON = "triton"


class _Forced:
    """A plain attribute: the form Dynamo can guard."""

    route: Route | None = None


forced = _Forced()
HAS_TRITON = importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def overriding(choices: object, **values) -> Iterator[None]:
    """Set attributes of ``choices`` for the scope; scopes nest, the innermost holds."""
    outer = {name: getattr(choices, name) for name in values}
    # by setattr, which Dynamo traces in torch 2.11 too
    for name, value in values.items():
        setattr(choices, name, value)
    try:
        yield
    finally:
        for name, value in outer.items():
            setattr(choices, name, value)


@contextlib.contextmanager
def force_route(route: Route) -> Iterator[None]:
    """Serve every call of the scope by ``route``, whatever the device; scopes nest, the innermost holds.

    Raises:
        ValueError: ``route`` is no :class:`Route`, or it is ``Route.TRITON`` and Triton is not installed.
    """
    if not isinstance(route, Route):
        raise ValueError(f"route: got {route!r}, wanted a Route; pass Route.REFERENCE or Route.TRITON")
    if route is Route.TRITON and not HAS_TRITON:
        raise ValueError("route: got Route.TRITON, but Triton is not installed; install triton or use Route.REFERENCE")
    with overriding(forced, route=route):
        yield


def runs_kernel(x: Tensor) -> bool:
    """Whether a call whose tensors live with ``x`` runs the Triton kernel (through the registered op) or the reference.

    Without Triton installed every call runs the reference.

    Raises:
        RuntimeError: either would lose a derivative of the torch.func transforms around the call (see ``transforms``).
    """
    check_transforms(x)
    return HAS_TRITON and x.is_cuda if forced.route is None else forced.route is Route.TRITON
