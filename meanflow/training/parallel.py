"""Training in several processes by torch's own engines: the objective replicated (DDP), or the network sharded (FSDP2).

    DDP                                         FSDP2
    loss = MeanFlowLoss(config, net, guide)     ema = copy.deepcopy(net)
    compile_loss(loss)                          compile_blocks(net), compile_blocks(ema)
    loss = replicate(loss)                      shard(net), shard(ema)
    optimizer = make_optimizer(.., net, ema)    optimizer = make_optimizer(.., net, ema)
                                                loss = MeanFlowLoss(config, net, guide)

Copy before sharding; make the optimizer after it, because sharding replaces the parameters. Each process plans its own
batch. Under FSDP2 a forward pass is a collective operation: all processes must run the same passes, as plans do.

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

from meanflow_kernels.inductor import prepare_compiler

from ..graph import on_capture_stream

BUCKET_MB = 100
"""Size of DDP's gradient buckets. DDP cuts a compiled objective between buckets, so that sums overlap with backward;
torch's 25 MB would cut an XL/2 into some hundred pieces, each compiled by itself."""

MEASURED_PASSES = 10
"""DDP times so many first passes, which no capture may hold: more of them must be made before."""

# graphs per block: 2 positions (first, later) x 4 modes (tangents, none, no_grad, frozen) x 3 batch sizes (static,
# dynamic, coinciding)
BLOCK_VARIANTS = 2 * 4 * 3


def replicate(loss: nn.Module, *, captured: bool = False) -> DistributedDataParallel:
    """Replicate the objective in every process, with gradients averaged; call the result once a step.

    All processes get the first one's weights. Gradients live in DDP's buckets, whose memory stays from step to step.

    Args:
        loss: on its device; compiled before, if at all, as one graph (`compile_loss`), which DDP then cuts where it
            sends gradients. Marks of dynamic sizes on the plan reach it.
        captured: its passes will be captured as CUDA graphs, sums included (torch's notes on CUDA graphs, "Usage with
            DistributedDataParallel"), after more than MEASURED_PASSES, on the stream of captures.
    """
    # buffers follow from the parameters and need no broadcast; torch 2.13 renamed the argument
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    with on_capture_stream() if captured else nullcontext():
        # no device_ids: inputs are passed on unchanged
        ddp = DistributedDataParallel(loss, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True, **{buffers: False})
    if captured:
        # it times every hundredth pass as well: never
        ddp._set_ddp_runtime_logging_sample_rate(2**31 - 1)
    return ddp


def is_replicated(loss: nn.Module) -> bool:
    """Whether an objective is replicated, and its gradients live in buckets."""
    return isinstance(loss, DistributedDataParallel)


def compile_blocks(net: nn.Module, backend: str = "inductor") -> None:
    """Compile each block as one graph, before :func:`shard`; blocks alike share their graphs.

    A batch size becomes dynamic when a second one is seen: warm up with more than one.
    """
    prepare_compiler()
    # torch's limit of 8 is too low
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BLOCK_VARIANTS)
    for block in net.blocks:
        block.compile(fullgraph=True, backend=backend)


def shard(net: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Shard parameters, gradients and optimizer state over the processes, in place; gather one block at a time.

    With a compute_dtype, blocks are gathered in it and their gradients summed in fp32. What runs in fp32 around them
    (embeddings of times and labels, the last layer) stays in fp32, as do the shards.

    Args:
        net: in training, or an average of its weights, with the same weights in every process.
        mesh: the processes to shard over; None: all. A two-dimensional mesh replicates over its first dimension.
    """
    # outputs are views; torch warns in case someone writes into them, which nobody does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # the residual stream enters a block in fp32, and its conditioning in compute_dtype
    policy = MixedPrecisionPolicy(net.compute_dtype, reduce_dtype=net.dtype, cast_forward_inputs=False)
    # reshard the root too: parameters left gathered after a forward without backward would miss the next update
    options = dict(mesh=mesh, reshard_after_forward=True)
    for block in net.blocks:
        fully_shard(block, mp_policy=policy, **options)
    fully_shard(net, **options)


def no_gradient_sync(loss: nn.Module) -> AbstractContextManager:
    """Keep a replicated objective's gradients local within a with block; the next backward outside sums them all.

    Shards are summed at once all the same: otherwise each process would hold whole gradients.
    """
    return loss.no_sync() if is_replicated(loss) else nullcontext()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """Gather a sharded tensor, or a norm of such tensors, in every process (a collective call); return others as is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
