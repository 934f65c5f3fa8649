"""The step by every name it is timed under: as public trainers write it, ours, and ours without an ingredient."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meanflow.config import RunConfig
from meanflow.method.contract import Objective, ObjectiveLoss, Sizes
from meanflow.model.build import build_net
from meanflow.objectives.build import make_objective
from meanflow.objectives.meanflow import MeanFlow
from meanflow.objectives.meanflow_plan import Drawn, Plan, whole_batch
from meanflow.training.draw import draw_batch
from meanflow.training.engine import compile_loss
from meanflow.training.messages import StepInputs
from meanflow.training.optim import make_optimizer, set_learning_rate
from meanflow.training.parallel import replicate
from meanflow.training.step import Step
from meanflow_kernels.routing import Route, force_route

from .naive import NaiveDiT, naive_terms
from .naive_imf import NaiveImfDiT, naive_imf_terms
from .step_workload import Workload


class Variant:
    """A way to make the step.

    Args:
        work: what is trained.
    """

    net: nn.Module

    def prepare(self, inputs: StepInputs) -> None:
        """Take the inputs of the next step; this is not timed."""
        raise NotImplementedError

    def step(self) -> None:
        """One step: every pass, backward, optimizer and average."""
        raise NotImplementedError

    def first_step(self) -> None:
        """The step whose gradient is compared, made from the initial weights."""
        self.step()

    def gradient(self) -> Tensor:
        """The gradient of the last step: all parameters as one fp32 vector on the CPU."""
        return torch.cat([p.grad.detach().float().flatten().cpu() for p in self.net.parameters()])

    def _place(self, build: Callable[[], nn.Module], work: Workload) -> nn.Module:
        """Build the network on its device and load its weights; returns its average."""
        with torch.device(work.device):
            net = build()
        net.load_state_dict(work.weights())
        self.net = net.to(work.device)
        return copy.deepcopy(self.net).requires_grad_(False)


NAIVE = {"dit": NaiveDiT, "imf": NaiveImfDiT}
"""The networks in plain torch."""


class Naive(Variant):
    """The step as public trainers write it, with torch's fused optimizer. It is given latents and noise."""

    def __init__(self, work: Workload, *, compiled: bool = False):
        objective = work.run.objective
        ema = self._place(lambda: NAIVE[work.run.model.network](work.run.model, work.compute_dtype), work)
        self.optimizer = make_optimizer(replace(work.run.optim, implementation="torch"), self.net, ema)
        self.draw = functools.partial(draw_batch, work.run)

        terms = naive_imf_terms if objective.direction == "v_head" else naive_terms

        def loss(*inputs):
            return terms(objective, self.net, *inputs).loss

        self.loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

    def prepare(self, inputs: StepInputs) -> None:
        x, e = self.draw(inputs.batch, inputs.samples, inputs.step)
        r, t, drop, guidance = inputs.drawn
        told = () if guidance is None else (guidance,)
        self.inputs = (x, e, r, t, inputs.batch.labels, drop, *told)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.inputs).backward()
        self.optimizer.step()


class Ours(Variant):
    """The trainer's own step.

    Args:
        objective: made for a run; None: as it is planned for training. implementation: of the optimizer.
        reference: whether the operators run as plain torch.
        replicated: whether gradients are summed as over several processes, in a group of one.
        train: options of the step, on top of the workload's.
    """

    def __init__(
        self,
        work: Workload,
        *,
        objective: Callable[[RunConfig], Objective] | None = None,
        implementation: str = "native",
        reference: bool = False,
        replicated: bool = False,
        **train,
    ):
        run = work.run
        run = replace(run, train=replace(run.train, **train), optim=replace(run.optim, implementation=implementation))
        ema = self._place(
            lambda: build_net(run.model, work.compute_dtype, checkpoint_blocks=run.train.checkpoint_blocks), work
        )
        low, captured = work.compute_dtype is not None, run.train.cuda_graph
        products = not replicated
        self.optimizer = make_optimizer(run.optim, self.net, ema, copies=low, products=products, captured=captured)
        # the workload's inputs bring the usual plan
        self.objective, self.replan = (objective or make_objective)(run), objective is not None
        loss = ObjectiveLoss(self.objective, self.net, ema if self.objective.takes_average else None)
        if run.train.compile:
            compile_loss(loss)
        if replicated:
            if not dist.is_initialized():
                backend = "nccl" if work.device == "cuda" else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            loss = replicate(loss, captured=captured)
        self.reference = reference
        self.run, self.make_step = run, Step(run, loss, self.optimizer, self.objective)

    def prepare(self, inputs: StepInputs) -> None:
        if self.replan:
            host = inputs.to(torch.device("cpu"))
            inputs = inputs._replace(plan=self.objective.plan(host.drawn)).to(inputs.samples.device)
        self.inputs = inputs

    def first_step(self) -> None:
        if self.run.train.cuda_graph:
            # made by hand, and captured then; without a rate it leaves the weights to the second, which the graph makes
            set_learning_rate(self.optimizer, 0.0)
            self.step()
            set_learning_rate(self.optimizer, self.run.optim.lr)
        self.step()

    def step(self) -> None:
        with force_route(Route.REFERENCE) if self.reference else nullcontext():
            self.make_step(self.inputs)


class WholeBatch(MeanFlow):
    """The official step: every pass on every sample, of one size."""

    @property
    def declared(self) -> tuple[Sizes, ...]:
        config = self.config
        passes = config.guided + (config.mixes_conditional or config.predicts_direction)
        return ((self.batch, passes * self.batch),)

    def plan(self, drawn: Drawn, *others: Drawn, exact: bool = False) -> Plan:
        return whole_batch(self.config, *drawn)


class PlannedAs(MeanFlow):
    """The same objective, planned as another one."""

    def __init__(self, run: RunConfig, **options):
        super().__init__(run.objective, run.train.batch)
        self._other = MeanFlow(replace(run.objective, **options), run.train.batch)

    @property
    def declared(self) -> tuple[Sizes, ...]:
        return self._other.declared

    def plan(self, drawn: Drawn, *others: Drawn, exact: bool = False) -> Plan:
        return self._other.plan(drawn, *others, exact=exact)

    def example(self, sizes: Sizes) -> Plan:
        return self._other.example(sizes)

    def dynamic(self, plan: Plan) -> list[Tensor]:
        return self._other.dynamic(plan)


def whole_batch_objective(run: RunConfig) -> Objective:
    """Every pass on every sample."""
    return WholeBatch(run.objective, run.train.batch)


def whole_tangent(run: RunConfig) -> Objective:
    """The derivative of every sample, guidance for the guided alone; no primal pass comes early enough to serve it."""
    return PlannedAs(run, equal_placement="first", share_equal=0.0)


def own_predictions(run: RunConfig) -> Objective:
    """A conditional prediction for every guided sample, as if other weights than the primal pass's made them."""
    return PlannedAs(run, guidance_weights="ema")


VARIANTS: dict[str, Callable[[Workload], Variant]] = {
    "naive": Naive,
    "naive-compiled": functools.partial(Naive, compiled=True),
    "ours": functools.partial(Ours, compile=True),
    "ours-captured": functools.partial(Ours, compile=True, cuda_graph=True),
    "ours-captured-replicated": functools.partial(Ours, compile=True, cuda_graph=True, replicated=True),
    "ours-whole-batch": functools.partial(Ours, compile=True, objective=whole_batch_objective),
    "ours-whole-tangent": functools.partial(Ours, compile=True, objective=whole_tangent),
    "ours-no-primal-reuse": functools.partial(Ours, compile=True, objective=own_predictions),
    "ours-no-kernels": functools.partial(Ours, compile=True, reference=True),
    "ours-torch-optimizer": functools.partial(Ours, compile=True, implementation="torch"),
    "ours-eager": Ours,
    "ours-eager-whole-batch": functools.partial(Ours, objective=whole_batch_objective),
    "ours-eager-whole-tangent": functools.partial(Ours, objective=whole_tangent),
    "ours-eager-no-primal-reuse": functools.partial(Ours, objective=own_predictions),
    "ours-eager-no-kernels": functools.partial(Ours, reference=True),
    "ours-eager-torch-optimizer": functools.partial(Ours, implementation="torch"),
}
"""Whole steps by name: "ours" is compiled, "ours-captured" adds CUDA graphs, "ours-captured-replicated" the sums of
several processes, in a group of one; the other "ours-" leave something out."""

LEFT_OUT = {
    "whole-batch": "the plan: every pass on the whole batch",
    "whole-tangent": "the subset tangent: du/dt of the whole batch (so that no primal pass can serve guidance)",
    "no-primal-reuse": "the primal pass as prediction: a conditional forward for every guided sample",
    "no-kernels": "the fused operators: their plain torch reference",
    "torch-optimizer": "the native optimizer: torch's fused AdamW and a foreach average",
    "eager": "torch.compile",
}
"""The ingredient that a variant leaves out, by the end of its name."""


def left_out(name: str) -> str | None:
    """The ingredient that "ours-..." or "ours-eager-..." leaves out; None for other variants."""
    return LEFT_OUT.get(name.removeprefix("ours-").removeprefix("eager-")) if name.startswith("ours-") else None


def same_as(name: str, work: Workload) -> str | None:
    """The reason why a variant would be the same step as another; None if it is a step of its own."""
    objective = work.run.objective
    base = "ours-eager" if name.startswith("ours-eager") else "ours"
    if name.endswith("no-kernels") and work.device == "cpu":
        return f"the same step as {base}: on a CPU the operators run as plain torch anyway"
    if name.endswith("no-primal-reuse") and not objective.mixes_conditional:
        return f"the same step as {base}: without kappa there are no conditional predictions"
    if name.endswith("whole-tangent") and objective.share_equal == 0:
        return f"the same step as {base}: every sample has r < t"
    return None
