"""What torch.compile is told of the operators before it meets them."""

import hashlib
import inspect

import torch

from . import dual
from .linear import op as linear

IN_GRAPH = ((dual, dual._forbid_gradient), (linear, linear._chunks))
"""Functions that Dynamo leaves in its graph as calls (allow_in_graph), each with its module."""


def prepare_compiler() -> None:
    """Tell torch.compile what it has to know of the operators; call it before compiling what calls them."""
    declare_fallbacks()
    declare_cacheable()


def declare_cacheable() -> None:
    """Let AOTAutograd keep compiled graphs that call the operators, for the next process to load.

    It passes its cache by where a graph calls a function that it does not know, as those of IN_GRAPH, since it sees the
    name and not the code. With the code as part of the key, a changed function is another one. A
    function of torch.autograd (the weights' copies) is in the graph with its forward and backward, which the key has.
    Graphs of torch.func.jvp it does not keep: they hold functions of torch's own that it does not know.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    for module, function in IN_GRAPH:
        code = hashlib.sha256(inspect.getsource(module).encode()).hexdigest()
        inductor.unsafe_marked_cacheable_functions |= {f"{module.__name__}.{function.__name__}": code}
    functorch.autograd_cache_allow_custom_autograd_functions = True


def declare_fallbacks() -> None:
    """Register Inductor's fallback for every operator, as it does itself at the first use: for torch before 2.13.

    There it writes the operator's arguments down for a log, whoever reads that: with all that they were made from, each
    as often as it is used. Where no pointwise kernel lies between operators and products, as in the backward of a DiT,
    that text doubles with every layer: at 12 layers compiling takes minutes more, at 28 it never ends.
    """
    if torch.__version__ >= "2.13":
        return
    from torch._inductor import lowering
    from torch._library.utils import get_layout_constraint_tag

    packets = vars(torch.ops.meanflow_kernels).values()
    for op in [packet.default for packet in packets if isinstance(packet, torch._ops.OpOverloadPacket)]:
        if op not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            lowering.make_fallback(op, layout_constraint=constraint)
