"""What the processes of a step exchange and move beside its samples, by engine: counted on meta tensors.

    ddp     all-reduce of all gradients in fp32, behind the backward
    zero1   reduce-scatter of them, behind the backward; then, after the step, a gather of what the network reads: bf16
            copies, and the rest in fp32. A tensor whose rows the processes do not divide is reduced whole
    fsdp    gather of the blocks in bf16 and of the rest in fp32 for each forward and once more for the backward;
            reduce-scatter of all gradients in fp32. Behind the passes

Whatever its samples, a process moves in its own memory: gradients cast to fp32, their norm, optimizer and average; of
all parameters (ddp), or of its part. What an engine packs for a collective is not counted.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from meanflow.config import RunConfig
from meanflow.errors import require
from meanflow.model.build import build_net
from meanflow.objectives.build import make_objective
from meanflow_kernels.adamw_ema import adamw_ema_bytes

from .accounts import META

ENGINES = ("ddp", "zero1", "fsdp")


@dataclass(frozen=True)
class Links:
    """What a GPU sends, and takes at the same time, in GB/s: supposed, the datasheets' rates, which no collective
    quite reaches.
    """

    nvlink: float = 450.0
    """Within a machine: an H100 or H200 SXM (NVIDIA's datasheets: 900 GB/s both ways)."""
    network: float = 50.0
    """Between machines: one ConnectX-7 of 400 Gb/s a GPU, InfiniBand (NVIDIA DGX H100 and H200 datasheets: eight)."""
    machine: int = 8
    """GPUs of a machine."""

    def __post_init__(self):
        for name, option in (("nvlink", "link-gbps"), ("network", "network-gbps")):
            require(getattr(self, name) > 0, option, getattr(self, name), "a positive number of GB/s", "change it")

    def check(self, gpus: int) -> None:
        """Raise UserError for machines that are not full."""
        wanted = f"at most {self.machine}, or a multiple of it"
        require(gpus <= self.machine or gpus % self.machine == 0, "gpus", gpus, wanted, "fill the machines")

    def _sent(self, collective: str, size: float, gpus: int) -> tuple[float, float]:
        """What a GPU sends within its machine and to others for a collective on so many bytes.

        Of a reduce-scatter or a gather all but its part within the machine, and of what its GPUs share out between them
        all but the machine's part to the others; an all-reduce is both.
        """
        near, machines = min(gpus, self.machine), max(1, gpus // self.machine)
        size *= 2 if collective == "all-reduce" else 1
        return size * (near - 1) / near, size / near * (machines - 1) / machines

    def sent(self, collective: str, size: float, gpus: int) -> float:
        """Bytes that a GPU sends for a collective on so many."""
        return sum(self._sent(collective, size, gpus))

    def ms(self, collective: str, size: float, gpus: int) -> float:
        """The time that takes, by one link after the other."""
        within, between = self._sent(collective, size, gpus)
        return (within / self.nvlink + between / self.network) / 1e6


@dataclass(frozen=True)
class Weights:
    """Parameters of a run's network in bf16: how many, in blocks, with a copy, and the rows of each."""

    params: list[Tensor]
    copies: list[Tensor | None]
    in_blocks: int
    """Numbers in blocks."""

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def copied(self) -> int:
        """Numbers with a copy."""
        return sum(p.numel() for p, copy in zip(self.params, self.copies, strict=True) if copy is not None)


def weights(config: RunConfig) -> Weights:
    """Those of a run."""
    with META:
        net = build_net(config.model, torch.bfloat16)
        copies = net.make_copies()
    return Weights(list(net.parameters()), copies, sum(p.numel() for block in net.blocks for p in block.parameters()))


def forwards(config: RunConfig) -> int:
    """Forward passes of a step of the largest sizes."""
    objective = make_objective(config)
    return sum(each.rows > 0 for each in objective.passes(objective.declared[0]).values())


def exchanged(engine: str, found: Weights, gpus: int, passes: int) -> dict[str, float]:
    """Bytes of the tensors that a step of so many forward passes exchanges, by collective."""
    if gpus == 1:
        return {}
    gradients = 4 * found.numel
    match engine:
        case "ddp":
            return {"all-reduce": gradients}
        case "fsdp":
            gathered = 2 * found.in_blocks + 4 * (found.numel - found.in_blocks)
            return {"gather": (passes + 1) * gathered, "reduce-scatter": gradients}
    sizes = Counter()
    for p, copy in zip(found.params, found.copies, strict=True):
        if len(p) % gpus:
            sizes["all-reduce"] += p.nbytes
        else:
            sizes["reduce-scatter"] += p.nbytes
            sizes["gather"] += (p if copy is None else copy).nbytes
    return dict(sizes)


def moved(found: Weights, engine: str | None = None, gpus: int = 1) -> float:
    """Bytes that a process moves in a step for its gradients and weights, beside its samples.

    Args:
        engine: None for a process alone, whose gradients stay products in bf16.
    """
    copied, rest = found.copied, found.numel - found.copied
    if engine is None:
        optimizer = adamw_ema_bytes(copied, emas=1, copies=True, bf16_grads=True)
        return optimizer + adamw_ema_bytes(rest, emas=1, copies=False) + 2 * copied + 4 * rest
    # sharded whole, a network is gathered in bf16 and keeps no copies
    copies = engine != "fsdp"
    optimizer = adamw_ema_bytes(copied, emas=1, copies=copies) + adamw_ema_bytes(rest, emas=1, copies=False)
    owned = optimizer + 4 * found.numel
    return (2 + 4) * copied + (owned if engine == "ddp" else owned / gpus)
