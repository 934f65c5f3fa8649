"""Which transforms a call may stand under, so that no tangent is ever lost without a word.

A Triton kernel sees tensors with every wrapper of ``torch.func`` taken off, and an explicit pair takes its tangents as
arguments. Both therefore carry one level of differentiation: the one that ``dual.unpack`` opens, or none. What lies
beyond raises here, on the reference route too, so that what runs on a CPU runs on a GPU. An op's ``*_ref`` function is
ordinary torch code and stands under anything.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor


def _levels() -> list[str]:
    """Names of the active torch.func transforms, outermost first: "Vmap", "Grad", "Jvp", "Functionalize"."""
    # torch.func has no public way to ask
    stack = torch._C._functorch.get_interpreter_stack()
    names = [] if stack is None else [level.key().name for level in stack]
    return [name for name in names if name != "Functionalize"]


def _refuse(what: str, levels: list[str]) -> None:
    raise RuntimeError(
        f"{what} was called under torch.func transforms {' > '.join(levels)} (outermost first), through which it would "
        "lose a derivative: it carries one forward-mode level, innermost. Use the *_ref function of the operator's "
        "reference.py, plain torch, which carries any"
    )


@torch.compiler.allow_in_graph
def _check_op(x: Tensor) -> Tensor:
    levels = _levels()
    inside_dual = forward_ad._current_level >= 0
    if "Grad" in levels or levels.count("Jvp") > 1 or (inside_dual and levels and levels[-1] != "Jvp"):
        _refuse("an operator", levels)
    return x


@torch.compiler.allow_in_graph
def _check_pair(x: Tensor) -> Tensor:
    levels = [name for name in _levels() if name != "Vmap"]
    if len(levels) > 1:
        _refuse("an explicit (primals, tangents) operator", levels)
    return x


def check_transforms(x: Tensor) -> None:
    """Raise RuntimeError where an operator called on ``x`` would drop a derivative of the active transforms."""
    if torch._C._are_functorch_transforms_active():
        _check_op(x)


def may_be_dual() -> bool:
    """Whether a tensor may carry a tangent: within a level of forward-mode AD, or of a graph that is being traced."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0


def check_pair_transforms(names: tuple[str, ...], primals: tuple, tangents: tuple) -> None:
    """Raise where a *_jvp call would drop a derivative: its arguments are duals themselves, or transforms are nested.

    Raises:
        ValueError: an argument is a forward-mode dual tensor.
        RuntimeError: more than one torch.func level differentiates.
    """
    if may_be_dual():
        for name, pair in zip(names, zip(primals, tangents, strict=True), strict=True):
            for suffix, x in zip(("", "_dot"), pair, strict=True):
                if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                    raise ValueError(
                        f"{name}{suffix}: got a forward-mode dual tensor, wanted a plain one; call the plain op, which "
                        "unpacks duals itself, or unpack them first"
                    )
    if torch._C._are_functorch_transforms_active():
        _check_pair(primals[0])


def tracked(x: Tensor) -> bool:
    """Whether reverse mode records what is done with a tensor, also behind the wrappers of torch.func."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad
