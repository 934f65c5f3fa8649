"""One training step, from stored latents to new weights: plain, compiled, or replayed as a CUDA graph."""

import functools
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils import _pytree as pytree

from ..command import heartbeat
from ..config import RunConfig
from ..method.contract import Objective, Plan, Sizes, Terms
from ..method.graph import Graph, on_capture_stream
from ..model.copies import product_copies, products_kept
from .draw import draw_batch
from .guard import SpikeGuard
from .messages import StepInputs, StepResult, explained_failures
from .optim import step_unless
from .parallel import MEASURED_PASSES, compiling_in_turn, is_replicated, mean_over_ranks, no_gradient_sync, total_norm


class Step:
    """A training step. A call makes one and leaves its gradient in ``p.grad``, for some weights in bf16 (`copies`).

    So does a captured step, in whichever graph. Alone and without accumulation, the gradients stay where a graph's own
    backward wrote them, and after a call ``p.grad`` is those tensors, valid until the next call. Their memory is lent
    (`Graph.lend`), so that graphs of all sizes take the room of one gradient. One place for all would mean adding to
    zeros there, or a copy: 10.8 or 5.4 GB more to move for an XL/2, 2.5 or 1.3 ms of 84 on an H200. Assigning
    ``p.grad`` costs nothing: the host does it while the GPU works.

    Several processes copy their gradients into DDP's buckets, whose sums run beside the backward, within the graph too.
    With accumulation a size has two graphs: one adds a micro-batch's gradient to that of those before, the other is of
    the last one and makes the rest of the step. Either way all graphs leave the gradients in one place outside of their
    memory, where ``p.grad`` is always.

    A process that dies within a replay leaves the others' GPUs waiting. torchrun ends those of its machine in half a
    minute (SIGTERM, SIGKILL after 30 s); those of other machines fail where they next ask for it, at the next step
    (`World.poll_stop`). Where a host waits for its GPU, NCCL's watchdog ends it after `world.TIMEOUT`, 30 minutes, the
    process group's timeout (with TORCH_NCCL_ASYNC_ERROR_HANDLING as it is by default, 3), at once if NCCL reports an
    error; a watchdog that hangs itself is ended after TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC, by default 8 minutes.

    Args:
        config: of the run; train.compile and train.cuda_graph decide the mode.
        loss: the objective of its networks, compiled (`compile_loss`) if train.compile says so, and then wrapped for
            several processes.
        optimizer: its step() updates the moving average too.
        objective: declares the sizes of its plans.
        guard: decides which steps to skip; None: none.
    """

    def __init__(
        self,
        config: RunConfig,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        guard: SpikeGuard | None = None,
    ):
        self.config, self.loss, self.optimizer, self.objective = config, loss, optimizer, objective
        self.guard = guard
        self.params = [p for p in loss.parameters() if p.requires_grad]
        self._products = product_copies(loss)
        self._draw = functools.partial(draw_batch, config)
        self._warm = not (config.train.compile or config.train.cuda_graph)
        self.compile_seconds = 0.0
        """Time spent on compiling and capturing so far."""
        self._graphs: dict[Sizes, _Graphs] = {}
        """Graphs by the plan's sizes."""
        self._pulse, self._behind = torch.zeros((), device=self.params[0].device), None
        if config.train.compile:
            self._draw = torch.compile(self._draw, fullgraph=True, dynamic=False)

    def __call__(self, *micro_batches: StepInputs) -> StepResult:
        """Update the weights by the mean gradient of some micro-batches, of all processes.

        Raises:
            UserError: if memory or the compiler fails, naming the setting that helps.
        """
        with explained_failures():
            if not self._warm:
                self._warm_up(micro_batches[0])
            with torch.compiler.set_stance("fail_on_recompile") if self.config.train.compile else nullcontext():
                if self.config.train.cuda_graph:
                    return self._replay(micro_batches)
                return self._run(micro_batches)

    def _gradient(self, inputs: StepInputs) -> Terms:
        """Add a micro-batch's share of the gradient."""
        batch, samples, step, drawn, plan, _ = inputs
        with record_function("draw"):
            x, e = self._draw(batch, samples, step)
        if self.config.train.compile:
            declare_sizes(self.objective, plan)
        count = self.config.train.accumulate
        with products_kept(self._products):
            with record_function("loss"):
                terms = self.loss(x, e, batch.labels, drawn, plan)
            with record_function("backward"):
                (terms.loss if count == 1 else terms.loss * (1 / count)).backward()
        return terms._replace(loss=terms.loss.detach())

    def _run(self, micro_batches: tuple[StepInputs, ...]) -> StepResult:
        self.loss.zero_grad()
        *earlier, last = micro_batches
        terms = [self._part(inputs) for inputs in earlier]
        done = self._last((last, [self._watched(each) for each in terms]))
        return done._replace(terms=(*terms, *done.terms))

    def _part(self, inputs: StepInputs) -> Terms:
        """Add the gradient of a micro-batch before the last."""
        with no_gradient_sync(self.loss):
            return self._gradient(inputs)

    def _last(self, given: tuple[StepInputs, list[list[Tensor]]]) -> StepResult:
        """Add the gradient of the last micro-batch, sum over processes beside its backward, then guard and optimizer.

        Args:
            given: the inputs, and what the guard watches of each micro-batch before.
        """
        inputs, watched = given
        terms = self._gradient(inputs)
        grad_norm = total_norm(self.loss, [p.grad for p in self.params])
        skip = torch.zeros_like(grad_norm)
        if self.guard is not None:
            losses = [torch.cat(each).mean() for each in zip(*watched, self._watched(terms), strict=True)]
            # the norm as well: the processes decide by the same bits, whatever each has computed
            means = mean_over_ranks(torch.stack([*losses, grad_norm]))
            skip = self.guard.check(means[:-1], means[-1], inputs.step)
        with record_function("optimizer"):
            if self.guard is None:
                self.optimizer.step()
            else:
                step_unless(self.optimizer, skip)
        return StepResult((terms,), grad_norm, skip)

    def _watched(self, terms: Terms) -> list[Tensor]:
        """What the guard watches of a micro-batch, by its samples."""
        return [] if self.guard is None else [getattr(terms, name) for name in self.guard.losses]

    def _warm_up(self, inputs: StepInputs) -> None:
        """Run every declared size once, to compile and load kernels, which a capture must not do; weights stay."""
        plans = self._declared_plans()
        with self._timed("compiling the step"), self._eagerly():
            for plan in plans:
                # torch 2.11 compiles nothing that has a gradient of another dtype, as products are
                self.loss.zero_grad()
                with compiling_in_turn(self.loss) if self.config.train.compile else nullcontext():
                    self._gradient(inputs._replace(plan=plan).to(inputs.samples.device))
            if self.config.train.cuda_graph and is_replicated(self.loss):
                for _ in range(MEASURED_PASSES + 1):
                    self._gradient(inputs._replace(plan=plans[-1]).to(inputs.samples.device))
            self.loss.zero_grad()
        self._warm = True

    def _declared_plans(self) -> list[Plan]:
        return [self.objective.example(sizes) for sizes in self.objective.declared]

    @contextmanager
    def _timed(self, what: str):
        start = time.perf_counter()
        with heartbeat(what):
            yield
        self.compile_seconds += time.perf_counter() - start

    # --- CUDA graphs ---

    def _eagerly(self) -> AbstractContextManager:
        """Where a step runs that is captured afterwards."""
        return on_capture_stream() if self.config.train.cuda_graph else nullcontext()

    def _replay(self, micro_batches: tuple[StepInputs, ...]) -> StepResult:
        if not self._graphs:
            # the first step runs eagerly, which loads the optimizer's kernels too
            with self._eagerly():
                result = self._run(micro_batches)
            self._capture(micro_batches[-1], [self._watched(each) for each in result.terms[:-1]])
            return result
        *earlier, last = micro_batches
        if earlier:
            torch._foreach_zero_([p.grad for p in self.params])
        terms = []
        for inputs in earlier:
            found = self._graphs[inputs.plan.sizes].part(inputs)
            # the next graph overwrites what this one returns
            terms.append(pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, found))
        graphs = self._graphs[last.plan.sizes]
        done = graphs.last((last, [self._watched(each) for each in terms]))
        if graphs.lent:
            self._leave(graphs.lent)
        if is_replicated(self.loss):
            # NCCL's watchdog sees no sum of a graph, but this one behind it, which a dead peer never answers
            self._behind = dist.all_reduce(self._pulse, async_op=True)
        return done._replace(terms=(*terms, *done.terms))

    def _capture(self, inputs: StepInputs, watched: list[list[Tensor]]) -> None:
        """Capture the step in every declared size, after an eager one, whose gradient is kept.

        All processes capture the same sizes in the same order, and then replay the same size at a time: a replay of
        sums is one of all processes.

        Args:
            watched: what the guard watches of each micro-batch before the last.
        """
        accumulates = self.config.train.accumulate > 1
        # DDP's buckets stay where they are, and so do gradients that micro-batches are added to
        lends = not (accumulates or is_replicated(self.loss))
        with self._timed("capturing the step"):
            # kept on the host: the device may have no room for it beside a graph's
            gradients = [p.grad.cpu() for p in self.params] if lends else []
            pool = torch.cuda.graph_pool_handle()
            for plan in self._declared_plans():
                example = inputs._replace(plan=plan).to(inputs.samples.device)
                if not accumulates:
                    # the graph makes them; drop those that the previous one has lent
                    self.loss.zero_grad()
                part = Graph(self._part, example, pool) if accumulates else None
                last = Graph(self._last, (example, watched), pool)
                self._graphs[plan.sizes] = _Graphs(part, last, [last.lend(p.grad) for p in self.params if lends])
            if lends:
                lent = self._graphs[inputs.plan.sizes].lent
                self._leave(lent)
                torch._foreach_copy_(lent, gradients)

    def _leave(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient

    def drop_graphs(self) -> None:
        """Free the graphs; another call would capture anew. NCCL ends a process group only when its graphs are gone."""
        self._graphs.clear()


class _Graphs(NamedTuple):
    """The graphs of a size."""

    part: Graph[StepInputs, Terms] | None
    """Of a micro-batch before the last; None where a process has one a step."""
    last: Graph[tuple[StepInputs, list[list[Tensor]]], StepResult]
    lent: list[Tensor]
    """The gradients that the last one leaves; empty where they are elsewhere."""


def declare_sizes(objective: Objective, plan: Plan) -> None:
    """Mark as dynamic the sizes that one compiled graph serves."""
    for group in objective.dynamic(plan):
        torch._dynamo.mark_dynamic(group, 0)
