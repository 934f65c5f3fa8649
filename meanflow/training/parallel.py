"""Several processes: the objective replicated (DDP), or the network sharded (FSDP2). Torch's own engines.

    DDP                                         FSDP2
    loss = MeanFlowLoss(config, net, guide)     ema = copy.deepcopy(net)
    compile_loss(loss)                          compile_blocks(net), compile_blocks(ema)
    loss = replicate(loss)                      shard(net), shard(ema)
    optimizer = make_optimizer(.., net, ema)    optimizer = make_optimizer(.., net, ema)
                                                loss = MeanFlowLoss(config, net, guide)

Copy before sharding; make the optimizer after it, for sharding replaces the parameters. Each process plans its own
batch. Under FSDP2 a forward pass is a collective operation: all processes need the same passes, which plans have.

Gradients are means over the processes: with batches of one size, those of the whole batch in one process.
"""

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

BUCKET_MB = 100
"""Gradients that DDP sums at a time. It cuts a compiled objective there, so that sums overlap with backward; torch's
25 MB would make some hundred pieces of an XL/2, each compiled by itself."""

# graphs of a block: of the first or another one; with tangents, without, without gradients, or of weights that are not
# trained; for one size, for any, and for sizes that happen to be equal
BLOCK_VARIANTS = 2 * 4 * 3


def replicate(loss: nn.Module) -> DistributedDataParallel:
    """The objective in every process, with gradients averaged over them; call it once a step.

    The processes' weights become the first one's.

    Args:
        loss: on its device. To compile it, do so before, as one graph (`compile_loss`): DDP then cuts the graph where
            it sends gradients. Marks on the plan's dynamic sizes reach it.
    """
    # the buffers follow from the parameters: nothing to send each step. torch 2.13 renamed the argument
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # without device_ids the inputs are passed as they are
    return DistributedDataParallel(loss, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True, **{buffers: False})


def compile_blocks(net: nn.Module, backend: str = "inductor") -> None:
    """Compile each block as one graph, before :func:`shard`; blocks alike share their graphs.

    Sizes of a batch that differ from step to step become dynamic when the second is met: warm up with more than one.
    """
    # torch's 8 are too few
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BLOCK_VARIANTS)
    for block in net.blocks:
        block.compile(fullgraph=True, backend=backend)


def shard(net: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Shard parameters, gradients and optimizer state over the processes, in place; a block is gathered at a time.

    With a compute_dtype, blocks are gathered in it and their gradients summed in fp32. What runs in fp32 around them
    (embeddings of times and labels, the last layer) stays in fp32, as do the shards.

    Args:
        net: in training, or an average of its weights, with the same weights in every process.
        mesh: over which processes; None is all. Two dimensions shard over the second and replicate over the first.
    """
    # outputs are views, which torch warns about in case someone writes into them; nobody does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # the residual stream enters a block in fp32, and its conditioning in compute_dtype
    policy = MixedPrecisionPolicy(net.compute_dtype, reduce_dtype=net.dtype, cast_forward_inputs=False)
    # after each forward, also of the root: what stays gathered without a backward (of an average, of samples) would
    # miss the optimizer's next step
    options = dict(mesh=mesh, reshard_after_forward=True)
    for block in net.blocks:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(net, **options)


def no_gradient_sync(loss: nn.Module) -> AbstractContextManager:
    """Within it, gradients of a replicated objective stay with each process; the next backward outside sums them all.

    Shards are summed at once: what they would otherwise wait as, whole gradients, is what sharding is to avoid.
    """
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor, or a norm of such tensors, in full, in every process (a collective); others as they are."""
    return x.full_tensor() if isinstance(x, DTensor) else x
