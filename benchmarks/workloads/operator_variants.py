"""The variants that every dual operator is measured in: ours, its reference, and plain torch under torch.func.jvp."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from meanflow_kernels.counts import Work, moved_bytes
from meanflow_kernels.routing import Route, force_route

from ..harness.operator_timer import OperatorTimer, check


@dataclass(frozen=True)
class Case:
    """One operator on one set of tensors."""

    op: Callable
    op_jvp: Callable
    plain: Callable
    """The same function in plain torch, as a model would spell it."""
    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    parameters: tuple = ()
    options: dict = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    """Matrix-product FLOPs of each call; none for pointwise operators."""


def _dual(case: Case) -> Callable:
    return lambda: case.op_jvp(case.primals, case.tangents, *case.parameters, **case.options)


def _quarter(case: Case) -> Callable:
    n = max(1, case.primals[0].shape[0] // 4)
    start, tangents = case.primals[0].shape[0] - n, tuple(x_dot[-n:] for x_dot in case.tangents)
    return lambda: case.op_jvp(case.primals, tangents, *case.parameters, tangent_start=start, **case.options)


def _primal(case: Case) -> Callable:
    return lambda: case.op(*case.primals, *case.parameters, **case.options)


def backward_of(fn: Callable, case: Case) -> Callable:
    """Run the forward of ``fn``, and return a function that returns its gradients and their cotangents."""
    inputs = [x.detach().requires_grad_() for x in case.primals]
    with torch.enable_grad():
        out = fn(*inputs, *case.parameters, **case.options)
    cotangents = [torch.randn_like(x) for x in pytree.tree_leaves(out)]
    return lambda: (torch.autograd.grad(out, inputs, cotangents, retain_graph=True), cotangents)


def _reference(case: Case) -> Callable:
    def run():
        with force_route(Route.REFERENCE):
            return case.op_jvp(case.primals, case.tangents, *case.parameters, **case.options)

    return run


def _func_jvp(case: Case) -> Callable:
    # no views: torch 2.13 cannot compile the jvp of a function whose inputs share a packed tensor
    primals, tangents = (tuple(x.clone() for x in xs) for xs in (case.primals, case.tangents))
    return lambda: torch.func.jvp(lambda *x: case.plain(*x, *case.parameters, **case.options), primals, tangents)


def _compiled(build: Callable) -> Callable:
    return lambda case: torch.compile(build(case), fullgraph=True, dynamic=False)


VARIANTS = {
    "ours": ("dual", _dual),
    "ours, tangent of a quarter": ("quarter", _quarter),
    "reference": ("dual", _reference),
    "reference, compiled": ("dual", _compiled(_reference)),
    "func.jvp": ("dual", _func_jvp),
    "func.jvp, compiled": ("dual", _compiled(_func_jvp)),
    "ours, primal": ("primal", _primal),
    "torch, primal": ("primal", lambda case: lambda: case.plain(*case.primals, *case.parameters, **case.options)),
    "ours, backward": ("backward", lambda case: backward_of(case.op, case)),
    "torch, backward": ("backward", lambda case: backward_of(case.plain, case)),
}
"""The timed variants by name: the kind of call, and a function that builds it.

``dual`` is the primal and the tangent, ``quarter`` the same with tangents of the batch's last quarter only, as most
training steps have them, ``primal`` the primal alone, ``backward`` its gradients.
"""


def _exact(case: Case, call: str, cotangents: list[Tensor], rows: list[int]) -> list[Tensor]:
    """fp64 results of the samples ``rows``: outputs and their tangents, outputs, or gradients of the primals."""
    primals = tuple(x[rows].double() for x in case.primals)
    parameters = [x.double() if isinstance(x, Tensor) else x for x in case.parameters]
    # results stay in fp64
    options = {name: value for name, value in case.options.items() if name != "out_dtype"}

    def plain(*x):
        return case.plain(*x, *parameters, **options)

    if call in ("dual", "quarter"):
        return pytree.tree_leaves(torch.func.jvp(plain, primals, tuple(x[rows].double() for x in case.tangents)))
    if call == "primal":
        return pytree.tree_leaves(plain(*primals))
    inputs = [x.requires_grad_() for x in primals]
    return list(torch.autograd.grad(pytree.tree_leaves(plain(*inputs)), inputs, [x[rows].double() for x in cotangents]))


def _errors(case: Case, call: str, results: list, cotangents: list, *, strict: bool) -> dict[str, float]:
    """Errors of the first, the middle and the last sample against fp64; raises where they are out of bounds."""
    batch = case.primals[0].shape[0]
    rows = [0, batch // 2, batch - 1]
    exact = _exact(case, call, cotangents, rows)
    # the second half of the results with a tangent are the tangents; those of a quarter belong to the last samples
    primal = len(exact) // 2 if call in ("dual", "quarter") else len(exact)
    lowest = min((x.dtype for x in results), key=lambda dtype: dtype.itemsize)
    pairs = {
        f"error_{i}": (x[rows], y) if x.shape[0] == batch else (x[-1:], y[-1:])
        for i, (x, y) in enumerate(zip(results, exact, strict=True))
    }
    errors = list(check(pairs, lowest, strict=strict).values())
    return {"error": max(errors[:primal])} | ({"error_dot": max(errors[primal:])} if errors[primal:] else {})


def measure(timer: OperatorTimer, benchmark, case: Case, name: dict, call: str, build: Callable) -> None:
    """Check a variant's results against fp64, then time it and keep the row.

    ``build(case)`` returns the function to time: it returns outputs and their tangents, outputs, or a pair
    (gradients of the primals, the cotangents they belong to).
    """
    try:
        fn = build(case)
        results, cotangents = fn(), []
        if call == "backward":
            results, cotangents = results
        results = pytree.tree_leaves(results)
        errors = _errors(case, call, results, cotangents, strict=name["variant"].startswith("ours"))
        n = {"dual": case.primals[0].shape[0], "quarter": results[-1].shape[0]}.get(call, 0)
        read = [*case.primals, *case.parameters, *(x_dot[:n] for x_dot in case.tangents), *cotangents]
        work = Work(case.flops.get(call, 0), moved_bytes(read, results))
        timer.time(benchmark, fn, name=name | {"call": call}, work=work, errors=errors)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")
