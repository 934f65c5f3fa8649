"""Network, average, objective and optimizer of a run, in one process or sharded over several."""

import copy
import os
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from meanflow_kernels.inductor import prepare_compiler

from ..config import ModelConfig, RunConfig
from ..errors import UserError, require
from ..method.contract import Objective, ObjectiveLoss
from ..model.build import Network, build_net, fill
from ..world import World
from .optim import make_optimizer, optimizer_of
from .parallel import OwnRows, Zero1, compile_blocks, replicate, shard

GRAIN = 32_768
"""Fewest numbers per thread that torch parallelises over: at::internal::GRAIN_SIZE."""


class Engine(NamedTuple):
    """The objects of a run that hold its weights."""

    net: Network
    ema: Network
    """The moving average of its weights, updated by the optimizer's step."""
    loss: nn.Module
    """The objective of net, compiled and for several processes as configured."""
    optimizer: torch.optim.Optimizer


def build_engine(
    config: RunConfig, world: World, objective: Objective, weights: dict[str, Tensor] | None = None
) -> Engine:
    """Build the engine of a run, with random initial weights or those given.

    Raises:
        UserError: for settings that do not go together, or with the machine.
    """
    train = config.train
    check(config, world, objective)
    dtype = torch.bfloat16 if train.precision == "bf16" else None
    net = build_net(config.model, dtype, checkpoint_blocks=train.checkpoint_blocks)
    if weights is None:
        net.init_weights(torch.Generator().manual_seed(train.seed))
    else:
        fill(net, weights, train.init)
    net = net.to(world.device)
    ema = copy.deepcopy(net).requires_grad_(False)
    zero1 = world.connected and train.parallel == "zero1"
    sharded = world.connected and train.parallel in ("fsdp", "hybrid")
    if sharded:
        mesh = make_mesh(config, world)
        for each in (net, ema):
            if train.compile:
                compile_blocks(each)
            shard(each, mesh)
    loss = ObjectiveLoss(objective, net, ema if objective.takes_average else None)
    if not sharded:
        if train.compile:
            compile_loss(loss)
        if world.connected:
            loss = replicate(loss, Zero1 if zero1 else DistributedDataParallel, captured=train.cuda_graph)
    # under FSDP a block is gathered in the compute dtype: no low-precision copies are needed
    copies = dtype is not None and not sharded
    if zero1:
        return shard_optimizer(config, net, ema, loss, copies, objective.takes_average)
    products = not world.connected and train.accumulate == 1
    optimizer = make_optimizer(config.optim, net, ema, copies=copies, products=products, captured=train.cuda_graph)
    return Engine(net, ema, loss, optimizer)


def shard_optimizer(config: RunConfig, net: Network, ema: Network, loss: Zero1, copies: bool, guides: bool) -> Engine:
    """The engine of a replicated objective whose weights, average and optimizer are sharded.

    guides: whether the average is read in training too.

    Raises:
        UserError: for a number of processes that does not divide the network's width.
    """
    size, width = dist.get_world_size(), config.model.hidden_size
    wanted = f"a number that divides model.hidden_size {width}, for zero1 gives each an equal part of a weight's rows"
    require(width % size == 0, "processes", size, wanted, "take another, or --train.parallel ddp or fsdp")
    rows = OwnRows(net, ema, copies=copies and config.optim.implementation == "native", guides=guides)
    optimizer = optimizer_of(config.optim, rows.weights, rows.averages, rows.copies, captured=config.train.cuda_graph)
    rows.follow(optimizer, loss)
    return Engine(rows.net, rows.ema, loss, optimizer)


def check(config: RunConfig, world: World, objective: Objective) -> None:
    """Raise if settings contradict each other, or do not fit the machine."""
    train = config.train
    if train.cuda_graph:
        hint = "set train.cuda_graph False"
        require(world.device.type == "cuda", "train.cuda_graph", True, "a GPU to capture on", f"{hint}, or a GPU")
        got, wanted = config.optim.implementation, "native, whose step can be skipped within a CUDA graph"
        require(got == "native", "optim.implementation", got, wanted, hint)
    if world.connected and train.parallel != "ddp" and config.optim.implementation == "apex":
        raise UserError("optim.implementation: got apex, wanted native or torch for shards; take native")
    if world.connected and train.parallel != "ddp" and train.precision == "bf16" and objective.takes_fp32:
        wanted = "ddp, where all weights are there in fp32, for an objective with passes in fp32"
        raise UserError(f"train.parallel: got {train.parallel}, wanted {wanted}; take ddp, or train.precision fp32")


def capture_if_possible(config: RunConfig, world: World) -> RunConfig:
    """The configuration, without train.cuda_graph where connected GPUs cannot capture their step; one line says so."""
    train = config.train
    if not (train.cuda_graph and world.connected and world.device.type == "cuda"):
        return config
    if train.parallel in ("ddp", "zero1") and "nccl" in dist.get_backend():
        return config
    got = f"train.parallel {train.parallel} over {dist.get_backend()}"
    if world.is_main:
        print(f"train.cuda_graph: got True with {got}, wanted ddp or zero1 over nccl; the step runs uncaptured")
    return replace(config, train=replace(train, cuda_graph=False))


def make_mesh(config: RunConfig, world: World):
    """The mesh to shard over, copies along its first dimension; None: shards over all processes.

    Raises:
        UserError: if hybrid's shards do not divide the processes.
    """
    if config.train.parallel == "fsdp":
        return None
    size = config.train.shard_size or world.local_size
    require(world.size % size == 0, "train.shard_size", size, f"a divisor of the {world.size} processes", "change it")
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def compile_loss(loss: nn.Module) -> None:
    """Compile the whole target computation, forward and backward, as one graph without a break."""
    prepare_compiler()
    loss.compile(fullgraph=True, dynamic=False)


def fit_threads(config: ModelConfig, batch: int) -> None:
    """Limit the CPU threads to the grains of a step's activations, unless OMP_NUM_THREADS is set.

    Args:
        batch: samples of this process at a time.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    tokens = (config.input_size // config.patch_size) ** 2
    grains = batch * tokens * config.hidden_size // GRAIN
    torch.set_num_threads(max(1, min(torch.get_num_threads(), grains)))
