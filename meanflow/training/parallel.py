"""Training in several processes by torch's own engines: the objective replicated (DDP), or the network sharded (FSDP2).

What a process holds of each tensor, and who makes it whole:

                            ddp             zero1                               fsdp, hybrid
    what the network reads  whole           whole, gathered after the step      shards, gathered in a block's passes
    gradients               whole, summed   whole; its own rows are summed      shards, summed as backward makes them
    fp32 weights            whole           its own rows                        shards
    average, moments        whole           its own rows                        shards

A process's own rows of a tensor are an equal part of them (`own_rows`); a tensor whose rows the processes do not divide
is whole everywhere. The network reads a weight's bf16 copy, where it has one, which the step writes; else a copy in
fp32 (in fp32 precision all; in bf16 some biases, embeddings and the like). Both collectives work in place.

    DDP                                         FSDP2
    loss = ObjectiveLoss(objective, net, ema)   ema = copy.deepcopy(net)
    compile_loss(loss)                          compile_blocks(net), compile_blocks(ema)
    loss = replicate(loss)                      shard(net), shard(ema)
    optimizer = make_optimizer(.., net, ema)    optimizer = make_optimizer(.., net, ema)
                                                loss = ObjectiveLoss(objective, net, ema)

Copy before sharding; make the optimizer after it, because sharding replaces the parameters. Each process plans its own
batch. Under FSDP2 a forward pass is a collective operation: all processes must run the same passes, as plans do.

Gradients are means over the processes: with batches of one size, those of the whole batch in one process.
"""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from meanflow_kernels.inductor import prepare_compiler

from ..method.graph import on_capture_stream
from .optim import gradient_norm

BUCKET_MB = 100
"""Size of DDP's gradient buckets. DDP cuts a compiled objective between buckets, so that sums overlap with backward;
torch's 25 MB would cut an XL/2 into some hundred pieces, each compiled by itself."""

MEASURED_PASSES = 10
"""DDP times so many first passes, which no capture may hold: more of them must be made before."""

# graphs per block: 2 positions (first, later) x 4 modes (tangents, none, no_grad, frozen) x 3 batch sizes (static,
# dynamic, coinciding)
BLOCK_VARIANTS = 2 * 4 * 3


def replicate(
    loss: nn.Module, kind: type[DistributedDataParallel] = DistributedDataParallel, *, captured: bool = False
) -> DistributedDataParallel:
    """Replicate the objective in every process, with gradients averaged; call the result once a step.

    All processes get the first one's weights. Gradients live in DDP's buckets, whose memory stays from step to step.

    Args:
        loss: on its device; compiled before, if at all, as one graph (`compile_loss`), which DDP then cuts where it
            sends gradients. Marks of dynamic sizes on the plan reach it.
        kind: DDP, or :class:`Zero1`.
        captured: its passes will be captured as CUDA graphs, sums included (torch's notes on CUDA graphs, "Usage with
            DistributedDataParallel"), after more than MEASURED_PASSES, on the stream of captures.
    """
    # buffers follow from the parameters and need no broadcast; torch 2.13 renamed the argument
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    with on_capture_stream() if captured else nullcontext():
        # no device_ids: inputs are passed on unchanged
        ddp = kind(loss, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True, **{buffers: False})
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


# --- zero1 ---


def own_rows(x: Tensor) -> Tensor:
    """This process's equal part of the rows of a tensor, a view; x itself where the processes do not divide them."""
    size = dist.get_world_size()
    rows, rest = divmod(len(x), size)
    return x if rest or size == 1 else x.narrow(0, dist.get_rank() * rows, rows)


def _has_nccl() -> bool:
    return "nccl" in dist.get_backend()


def _start(collective: Callable, pairs: Sequence[tuple[Tensor, Tensor]], **options) -> list[dist.Work]:
    """Start a collective on pairs of an output and an input: as a single one by NCCL, which gloo cannot."""
    with _coalescing_manager(async_ops=True) if _has_nccl() else nullcontext() as together:
        works = [collective(y, x, async_op=True, **options) for y, x in pairs]
    return works if together is None else together.works


# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _average_own_rows(works: list[dist.Work], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook on a bucket of gradients that are ready: start to average, each process its own rows, in place."""
    average = dist.ReduceOp.AVG
    if not _has_nccl():  # gloo has sums only
        average = dist.ReduceOp.SUM
        bucket.buffer().div_(dist.get_world_size())
    pairs = [(own_rows(grad), grad) for grad in bucket.gradients()]
    works += [dist.all_reduce(x, average, async_op=True) for own, x in pairs if own is x]
    works += _start(_reduce_scatter, [(own, x) for own, x in pairs if own is not x], op=average)
    # DDP need not wait, for the gradients lie where it expects them: whoever reads them does
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class Zero1(DistributedDataParallel):
    """A replicated objective (`replicate`), of whose gradients each process has the mean in its own rows only."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._works: list[dist.Work] = []
        self.register_comm_hook(self._works, _average_own_rows)

    def forward(self, *inputs):
        """Call the objective."""
        # backward would write where a step that never was, to compile, still sends
        self._wait()
        return super().forward(*inputs)

    def _wait(self) -> None:
        while self._works:
            self._works.pop().wait()

    def gradients(self) -> list[Tensor]:
        """The own rows of each parameter's gradient, in order (views). The host does not wait for a GPU."""
        self._wait()
        return [own_rows(p.grad) for p in self.parameters()]

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient (), alike in all processes."""
        grads = zip(self.parameters(), self.gradients(), strict=True)
        # what is whole everywhere counts once
        norm = gradient_norm([grad for p, grad in grads if dist.get_rank() == 0 or grad.shape != p.shape])
        square = norm.double().square()
        dist.all_reduce(square)
        return square.sqrt().to(norm.dtype)


class OwnRows:
    """This process's rows of a network's fp32 weights and of their average, which an optimizer steps.

    Args:
        net: in training, with the same whole weights in every process. It goes on to read whole tensors; fp32 weights
            that it has copies of are given up.
        ema: its average, whole.
        copies: whether net reads low-precision copies (`Transformer.make_copies`).
        guides: whether ema is read in training too, and must stay whole.
    """

    def __init__(self, net: nn.Module, ema: nn.Module, *, copies: bool, guides: bool):
        params, averages = list(net.parameters()), list(ema.parameters())
        # copied, not viewed: torch can only save a DTensor that begins where its memory does
        self.weights, self.averages = ([own_rows(p.detach()).clone() for p in each] for each in (params, averages))
        mesh = init_device_mesh(params[0].device.type, (dist.get_world_size(),))
        self.net, self.ema = _holder(ema, self.weights, mesh), _holder(ema, self.averages, mesh)
        """Networks that hold the rows by name, as DTensors, to save, to load and to compare; not to run."""
        kept = net.make_copies() if copies else [None] * len(params)
        self.copies = [None if x is None else own_rows(x) for x in kept]
        """What a step writes beside the weights, None for a weight without."""
        # what is read in fp32, and what it follows
        followed = [(p.detach(), own) for p, own, x in zip(params, self.weights, kept, strict=True) if x is None]
        followed += [(p, own) for p, own in zip(averages, self.averages, strict=True) if guides]
        self._followers, self._followed = [own_rows(x) for x, _ in followed], [own for _, own in followed]
        read = [x for x in kept if x is not None] + [x for x, _ in followed]
        self._cut = [(x, own) for x in read if (own := own_rows(x)) is not x]
        for p, x in zip(params, kept, strict=True):
            if x is not None:
                # a parameter without memory, which takes gradients
                p.data = p.new_full((), float("nan")).expand(p.shape)
        self.net.register_load_state_dict_post_hook(lambda *_: self._renew())

    def follow(self, optimizer: torch.optim.Optimizer, loss: Zero1) -> None:
        """Give an optimizer of the rows their gradients before each step, and gather what it has changed after it."""
        optimizer.register_step_pre_hook(lambda *_: self._take(loss.gradients()))
        optimizer.register_step_post_hook(lambda *_: self._gather())

    def _take(self, gradients: Sequence[Tensor | None]) -> None:
        for own, grad in zip(self.weights, gradients, strict=True):
            own.grad = grad

    @torch.no_grad()
    def _gather(self) -> None:
        self._take([None] * len(self.weights))
        torch._foreach_copy_(self._followers, self._followed)
        for work in _start(_all_gather, self._cut):
            work.wait()

    @torch.no_grad()
    def _renew(self) -> None:
        """Bring what the network reads up to date with weights that were loaded."""
        for x, own in zip(self.copies, self.weights, strict=True):
            if x is not None:
                x.copy_(own)
        self._gather()


def _holder(net: nn.Module, rows: Sequence[Tensor], mesh: DeviceMesh) -> nn.Module:
    holder = copy.deepcopy(net)
    held = {
        name: own if own.shape == p.shape else DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        for (name, p), own in zip(net.named_parameters(), rows, strict=True)
    }
    holder.load_state_dict(held, assign=True)
    return holder


def runnable(net: nn.Module) -> nn.Module:
    """A network to run: one with whole weights if it holds rows of them (a collective call), else net itself."""
    if isinstance(net, FSDPModule) or not any(isinstance(p, DTensor) for p in net.parameters()):
        return net
    whole = copy.deepcopy(net)
    whole.load_state_dict({name: full_tensor(x) for name, x in net.state_dict().items()}, assign=True)
    return whole


# --- all kinds ---


def no_gradient_sync(loss: nn.Module) -> AbstractContextManager:
    """Keep a replicated objective's gradients local within a with block; the next backward outside sums them all.

    Shards are summed at once all the same: otherwise each process would hold whole gradients.
    """
    return loss.no_sync() if is_replicated(loss) else nullcontext()


def total_norm(loss: nn.Module, grads: Sequence[Tensor]) -> Tensor:
    """The norm of the whole gradient (), of whose tensors this process may hold a part."""
    return loss.gradient_norm() if isinstance(loss, Zero1) else full_tensor(gradient_norm(grads))


def _numbered_alike(device: torch.device) -> bool:
    """Whether the devices of all processes have the number 0, or none. A collective call."""
    number = torch.tensor(device.index or 0, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item() == 0


@contextmanager
def compiling_in_turn(loss: nn.Module) -> Iterator[None]:
    """Run a with block in the first process of each machine, then in the others, which load what it has compiled.

    So it is with a replicated objective, whose gradients stay local meanwhile: the block must not be a collective call.
    A forward of shards is one, so there all processes compile at once. They do too where not every process calls its
    GPU 0 (:func:`meanflow.startup.see_own_gpu`): the number is among what torch finds a graph again by.
    """
    if not is_replicated(loss) or not _numbered_alike(next(loss.parameters()).device):
        yield
        return
    first = dist.get_rank() % int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) == 0
    if not first:
        dist.barrier()
    try:
        with loss.no_sync():
            yield
    finally:
        # what fails in the first fails in the others too, each with its message
        if first:
            dist.barrier()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    if dist.is_initialized():
        x = x / dist.get_world_size()
        dist.all_reduce(x)
    return x


def full_tensor(x: Tensor) -> Tensor:
    """Gather a sharded tensor, or a norm of such tensors, in every process (a collective call); return others as is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
