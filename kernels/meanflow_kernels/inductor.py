"""What torch.compile is told of the operators before it meets them."""

import torch


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
