"""One training step, from stored latents to new weights: plain, compiled, or replayed as a CUDA graph."""

import functools
import time
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..command import heartbeat
from ..config import RunConfig
from ..graph import Graph
from ..method.plan import Plan, Planner
from ..method.terms import Terms
from ..model.copies import product_copies, products_kept
from .draw import draw_batch
from .guard import SpikeGuard
from .messages import StepInputs, StepResult, explained_failures
from .optim import gradient_norm, step_unless
from .parallel import full_tensor, mean_over_ranks, no_gradient_sync


class Step:
    """A training step. A call makes one and leaves its gradient in ``p.grad``, for some weights in bf16 (`copies`).

    So does a captured step, in whichever graph: the gradients stay where a graph's own backward wrote them, and after a
    call ``p.grad`` is those tensors, valid until the next call. Their memory is lent (`Graph.lend`), so that graphs of
    all sizes take the room of one gradient. One place for all would mean adding to zeros there, or a copy: 10.8 or
    5.4 GB more to move for an XL/2, 2.5 or 1.3 ms of 84 on an H200. Assigning ``p.grad`` costs nothing: the host does
    it while the GPU works.

    Args:
        config: of the run; train.compile and train.cuda_graph decide the mode.
        loss: the objective, compiled (`compile_loss`) if train.compile says so, and then wrapped for several processes.
        optimizer: its step() updates the moving average too.
        planner: makes the plans, and declares their sizes.
        guard: decides which steps to skip; None: none.
    """

    def __init__(
        self,
        config: RunConfig,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        planner: Planner,
        guard: SpikeGuard | None = None,
    ):
        self.config, self.loss, self.optimizer, self.planner = config, loss, optimizer, planner
        self.guard = guard
        self.params = [p for p in loss.parameters() if p.requires_grad]
        self._products = product_copies(loss)
        self._draw = functools.partial(draw_batch, config)
        self._warm = not (config.train.compile or config.train.cuda_graph)
        self.compile_seconds = 0.0
        """Time spent on compiling and capturing so far."""
        self._graphs: dict[tuple, tuple[Graph, list[Tensor]]] = {}
        """Graphs by the plan's sizes, each with the gradients it leaves."""
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

    def _gradient(self, inputs: StepInputs, share: float = 1.0) -> Terms:
        """Add a micro-batch's share of the gradient."""
        batch, samples, step, r, t, drop, plan, guidance = inputs
        with record_function("draw"):
            x, e = self._draw(batch, samples, step)
        if self.config.train.compile:
            declare_sizes(plan)
        with products_kept(self._products):
            with record_function("loss"):
                terms = self.loss(x, e, r, t, batch.labels, drop, plan, guidance)
            with record_function("backward"):
                (terms.loss if share == 1 else terms.loss * share).backward()
        return terms._replace(loss=terms.loss.detach())

    def _run(self, micro_batches: tuple[StepInputs, ...]) -> StepResult:
        self.optimizer.zero_grad()
        terms = []
        for inputs in micro_batches:
            # gradients are summed over processes with the last one
            with no_gradient_sync(self.loss) if inputs is not micro_batches[-1] else nullcontext():
                terms.append(self._gradient(inputs, 1 / len(micro_batches)))
        grad_norm = full_tensor(gradient_norm([p.grad for p in self.params]))
        skip = torch.zeros_like(grad_norm)
        if self.guard is not None:
            losses = [torch.cat([getattr(each, name) for each in terms]).mean() for name in self.guard.losses]
            losses = mean_over_ranks(torch.stack(losses))
            skip = self.guard.check(losses, grad_norm, micro_batches[0].step)
        with record_function("optimizer"):
            if self.guard is None:
                self.optimizer.step()
            else:
                step_unless(self.optimizer, skip)
        return StepResult(tuple(terms), grad_norm, skip)

    def _warm_up(self, inputs: StepInputs) -> None:
        """Run every declared size once, to compile and load kernels, which a capture must not do; weights stay."""
        with self._timed("compiling the step"):
            for plan in self._declared_plans():
                self._gradient(inputs._replace(plan=plan).to(inputs.samples.device))
            self.optimizer.zero_grad()
        self._warm = True

    def _declared_plans(self) -> list[Plan]:
        return [
            self.planner.example(guidance, tangent)
            # largest first: memory that fits it fits the others
            for tangent in reversed(self.planner.tangent_sizes)
            for guidance in reversed(self.planner.guidance_sizes)
        ]

    @contextmanager
    def _timed(self, what: str):
        start = time.perf_counter()
        with heartbeat(what):
            yield
        self.compile_seconds += time.perf_counter() - start

    # --- CUDA graphs ---

    def _replay(self, micro_batches: tuple[StepInputs, ...]) -> StepResult:
        # no accumulation: each micro-batch has a size of its own, and their combinations are too many to capture
        (inputs,) = micro_batches
        if not self._graphs:
            # the first step runs eagerly, which loads the optimizer's kernels too
            result = self._run((inputs,))
            self._capture(inputs)
            return result
        graph, gradients = self._graphs[_shapes(inputs)]
        result = graph(inputs)
        self._leave(gradients)
        return result

    def _capture(self, inputs: StepInputs) -> None:
        """Capture the step in every declared size, after an eager one, whose gradient is kept."""
        with self._timed("capturing the step"):
            # kept on the host: the device may have no room for it beside a graph's
            gradients = [p.grad.cpu() for p in self.params]
            pool = torch.cuda.graph_pool_handle()
            for plan in self._declared_plans():
                example = inputs._replace(plan=plan).to(inputs.samples.device)
                # drop the gradients that the previous graph has lent
                self.optimizer.zero_grad()
                graph = Graph(lambda inputs: self._run((inputs,)), example, pool)
                self._graphs[_shapes(example)] = graph, [graph.lend(p.grad) for p in self.params]
            _, lent = self._graphs[_shapes(inputs)]
            self._leave(lent)
            torch._foreach_copy_(lent, gradients)

    def _leave(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient


def _shapes(inputs: StepInputs) -> tuple:
    return len(inputs.plan.rows), inputs.plan.tangent_start


def declare_sizes(plan: Plan) -> None:
    """Mark the plan's sizes as dynamic: one compiled graph serves all sizes of a group except 0 and the whole batch."""
    groups = [plan.rows, plan.null] if len(plan.rows) else []
    if plan.order is not None and 0 < plan.tangent_start < len(plan.guided):
        groups.append(plan.tangent)
    for group in groups:
        torch._dynamo.mark_dynamic(group, 0)
