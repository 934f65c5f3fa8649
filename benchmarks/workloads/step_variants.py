"""The step by every name it is timed under: as public trainers write it, ours, and ours without an ingredient."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meanflow.config import ObjectiveConfig
from meanflow.method.guidance import GuidanceInputs
from meanflow.method.objective import MeanFlowLoss
from meanflow.method.plan import Plan, Planner, whole_batch
from meanflow.model.build import build_net
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
        told = () if inputs.guidance is None else (inputs.guidance,)
        self.inputs = (x, e, inputs.r, inputs.t, inputs.batch.labels, inputs.drop, *told)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.inputs).backward()
        self.optimizer.step()


class Ours(Variant):
    """The trainer's own step.

    Args:
        planner: of the passes, from an objective and a batch size. implementation: of the optimizer.
        reference: whether the operators run as plain torch.
        replicated: whether gradients are summed as over several processes, in a group of one.
        train: options of the step, on top of the workload's.
    """

    def __init__(
        self,
        work: Workload,
        *,
        planner: Callable[[ObjectiveConfig, int], Planner] = Planner,
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
        loss = MeanFlowLoss(run.objective, self.net)
        if run.train.compile:
            compile_loss(loss)
        if replicated:
            if not dist.is_initialized():
                backend = "nccl" if work.device == "cuda" else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            loss = replicate(loss, captured=captured)
        # the workload's inputs bring the usual plan
        self.planner, self.replan = planner(run.objective, run.train.batch), planner is not Planner
        self.reference = reference
        self.run, self.make_step = run, Step(run, loss, self.optimizer, self.planner)

    def prepare(self, inputs: StepInputs) -> None:
        if self.replan:
            host = inputs.to(torch.device("cpu"))
            plan = self.planner.plan(host.r, host.t, host.drop, host.guidance)
            inputs = inputs._replace(plan=plan).to(inputs.samples.device)
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


class WholeBatch(Planner):
    """The official step: every pass on every sample, of one size."""

    def __init__(self, config: ObjectiveConfig, batch: int):
        super().__init__(config, batch)
        self.tangent_sizes = (batch,)
        self.guidance_sizes = (batch * (config.guided + (config.mixes_conditional or config.predicts_direction)),)

    def plan(self, r: Tensor, t: Tensor, drop: Tensor, inputs: GuidanceInputs | None = None) -> Plan:
        return whole_batch(self.config, r, t, drop, inputs)


def whole_tangent(config: ObjectiveConfig, batch: int) -> Planner:
    """The derivative of every sample, guidance for the guided alone; no primal pass comes early enough to serve it."""
    return Planner(replace(config, equal_placement="first", share_equal=0.0), batch)


def own_predictions(config: ObjectiveConfig, batch: int) -> Planner:
    """A conditional prediction for every guided sample, as if other weights than the primal pass's made them."""
    return Planner(replace(config, guidance_weights="ema"), batch)


VARIANTS: dict[str, Callable[[Workload], Variant]] = {
    "naive": Naive,
    "naive-compiled": functools.partial(Naive, compiled=True),
    "ours": functools.partial(Ours, compile=True),
    "ours-captured": functools.partial(Ours, compile=True, cuda_graph=True),
    "ours-captured-replicated": functools.partial(Ours, compile=True, cuda_graph=True, replicated=True),
    "ours-whole-batch": functools.partial(Ours, compile=True, planner=WholeBatch),
    "ours-whole-tangent": functools.partial(Ours, compile=True, planner=whole_tangent),
    "ours-no-primal-reuse": functools.partial(Ours, compile=True, planner=own_predictions),
    "ours-no-kernels": functools.partial(Ours, compile=True, reference=True),
    "ours-torch-optimizer": functools.partial(Ours, compile=True, implementation="torch"),
    "ours-eager": Ours,
    "ours-eager-whole-batch": functools.partial(Ours, planner=WholeBatch),
    "ours-eager-whole-tangent": functools.partial(Ours, planner=whole_tangent),
    "ours-eager-no-primal-reuse": functools.partial(Ours, planner=own_predictions),
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
