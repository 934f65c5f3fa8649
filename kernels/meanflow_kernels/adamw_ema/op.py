"""adamw_ema: checks, the choice between the native operator and the reference, and the public function."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..checks import fail
from .native import MISSING, warn_missing
from .reference import adamw_ema_ref

MAX_EMAS = 4
"""Averages kept at a time; kMaxEmas in csrc."""


def adamw_ema_bytes(numel: int, *, emas: int, copies: bool, bf16_grads: bool = False) -> int:
    """Bytes that a step on ``numel`` fp32 parameters moves at least: all read once, each result written once."""
    return numel * (3 * 4 + (2 if bf16_grads else 4) + 3 * 4 + emas * 2 * 4 + copies * 2)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of DTensors; other tensors as they are."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def _check_numbers(betas: tuple[float, float], eps: float, weight_decay: float, emas: Mapping) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        fail("betas", betas, "two numbers in [0, 1)", "pass for instance (0.9, 0.95)")
    if not eps >= 0:
        fail("eps", eps, "a number >= 0", "pass for instance 1e-8")
    if not weight_decay >= 0:
        fail("weight_decay", weight_decay, "a number >= 0", "pass 0.0 for none")
    if len(emas) > MAX_EMAS:
        fail("emas", f"{len(emas)} decays", f"at most {MAX_EMAS}", "keep the others in a loop of your own")
    for decay in emas:
        if not 0 <= decay <= 1:
            fail("emas", f"decay {decay}", "a decay in [0, 1]", "pass for instance {0.9999: tensors}")


def _check_scalars(steps: Sequence[Tensor], lr: float | Tensor, skip: Tensor | None, params: Sequence[Tensor]) -> None:
    if len(steps) != len(params) or any(step.numel() != 1 for step in steps):
        fail(
            "steps",
            f"{len(steps)} tensors",
            f"{len(params)} scalar tensors, one a parameter",
            "start from torch.zeros(())",
        )
    if isinstance(lr, Tensor) and lr.numel() != 1:
        fail("lr", f"a tensor of {lr.numel()} elements", "a float or a tensor of one element", "pass one learning rate")
    if isinstance(lr, Tensor) and params and lr.device.type != "cpu" and lr.device != params[0].device:
        fail("lr", f"device {lr.device}", f"{params[0].device}, as the parameters, or cpu", "create it there")
    if skip is not None and params and (skip.numel() != 1 or skip.device != params[0].device):
        got = f"{skip.numel()} elements on {skip.device}"
        fail("skip", got, f"a scalar tensor on {params[0].device}, as the parameters", "create it there")


def _check_lists(lists: Mapping[str, Sequence[Tensor]], params: Sequence[Tensor]) -> None:
    """Each list has one tensor a parameter, of its shape, on its device and, for DTensors, with its placements."""
    # a network has hundreds of parameters: what does not depend on the list is asked once
    wanted = [(p.shape, p.device) for p in params]
    placements = [getattr(p, "placements", None) for p in params]
    sharded = any(placements)
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            fail(name, f"{len(tensors)} tensors", f"{len(params)}, one a parameter", "pass the lists in the same order")
        for i, (x, (shape, device)) in enumerate(zip(tensors, wanted, strict=True)):
            if x.shape != shape:
                fail(
                    f"{name}[{i}]", f"shape {tuple(x.shape)}", f"{tuple(shape)}, as params[{i}]", "nothing is broadcast"
                )
            if x.device != device:
                fail(f"{name}[{i}]", f"device {x.device}", f"{device}, as params[{i}]", f"move it with .to('{device}')")
            if x.layout is not torch.strided:
                fail(f"{name}[{i}]", f"layout {x.layout}", "a dense tensor", "build the embedding with sparse=False")
            if sharded and getattr(x, "placements", None) != placements[i]:
                got = getattr(x, "placements", "a plain tensor")
                fail(f"{name}[{i}]", got, f"{placements[i]}, as params[{i}]", "shard it like its parameter")


def _is_native(lists: Sequence[Sequence[Tensor]], grads: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Whether csrc takes these: contiguous and fp32, gradients or bf16, copies bf16, on one device with a library."""
    device = lists[0][0].device
    for tensors, dtypes in (
        (chain.from_iterable(lists), (torch.float32,)),
        (grads, (torch.float32, torch.bfloat16)),
        (copies, (torch.bfloat16,)),
    ):
        for x in tensors:
            if x.dtype not in dtypes or x.device != device or not x.is_contiguous():
                return False
    if device.type in MISSING and not torch.compiler.is_compiling():
        warn_missing(device.type)
    return device.type in ("cpu", "cuda") and device.type not in MISSING


@torch.no_grad()
def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    emas: Mapping[float, Sequence[Tensor]] | None = None,
    copies: Sequence[Tensor] = (),
    skip: Tensor | None = None,
) -> None:
    """One optimizer step, in place: AdamW with torch's mathematics, then the averages and bf16 copies of the result.

    Contiguous fp32 tensors on one device go through memory once (csrc/). On the CPU the result is that of torch's fused
    AdamW followed by ``torch._foreach_lerp_``, bit for bit but for the last place of a few exp_avg_sq (those behind
    torch's last full vector), on any number of threads. All other tensors, and those of a device without a native
    library, take plain torch.
    On a GPU nothing waits for the host; keep ``lr`` in a tensor on the device to change it in a captured CUDA graph.

    Args:
        params: n tensors of any shape. DTensors are stepped on their local shards.
        grads, exp_avgs, exp_avg_sqs: n tensors each, shaped as the parameters. A gradient may be bf16: it is widened.
        steps: n scalar fp32 tensors on the parameters' device, the steps taken so far; each is counted up by one.
        lr: the learning rate, a number or a scalar tensor.
        emas: for each decay (at most 4) n tensors that follow ema <- ema + (1 - decay) (p - ema).
        copies: n tensors that receive the new parameters, rounded to bf16; or none.
        skip: a scalar fp32 tensor on the parameters' device: where it is 1 and not 0 nothing changes, steps neither.
            The host does not wait for it.

    Raises:
        ValueError: an argument out of range, or a list that does not match the parameters.
    """
    emas = emas or {}
    _check_numbers(betas, eps, weight_decay, emas)
    _check_scalars(steps, lr, skip, params)
    named = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    named |= {f"emas[{decay}]": tensors for decay, tensors in emas.items()}
    _check_lists(named | ({"copies": copies} if copies else {}), params)
    if not params:
        return

    lists = [_local(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps, *emas.values())]
    copies = _local(copies)
    if not _is_native([lists[0], *lists[2:]], lists[1], copies):
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        adamw_ema_ref(*lists[:5], emas=dict(zip(emas, lists[5:], strict=True)), copies=copies, skip=skip, **settings)
        return
    if skip is None:
        torch._foreach_add_(lists[4], 1)
    else:
        # without alpha torch takes a tensor for a number, and waits for it
        torch._foreach_add_(lists[4], 1 - skip.float().reshape(()), alpha=1)
    flat_emas = [x for ema in lists[5:] for x in ema]
    rate = lr.double() if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    word = torch.zeros(()) if skip is None else skip.float()
    torch.ops.meanflow_kernels.adamw_ema(
        *lists[:5], flat_emas, copies, rate, word, *betas, eps, weight_decay, list(emas)
    )
    if not torch.compiler.is_compiling():
        # so that autograd notices a backward through weights that have changed since its forward
        torch.autograd.graph.increment_version([*lists[0], *lists[2], *lists[3], *flat_emas, *copies])
