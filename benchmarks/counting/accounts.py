"""Accounts of a step: FLOPs of each pass, and bytes kept for the backward."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from meanflow.config import RunConfig
from meanflow.draws import Draws, Purpose
from meanflow.errors import require
from meanflow.method.guidance import GuidanceInputs, draw_guidance
from meanflow.method.objective import meanflow_terms
from meanflow.method.plan import Plan, Planner
from meanflow.method.times import draw_times, drop_mask
from meanflow.model.build import build_net
from meanflow_kernels.adamw_ema import adamw_ema_bytes
from meanflow_kernels.routing import Route, force_route

BATCHES = 1000
"""Number of drawn batches that a mean is taken over."""
PASSES = ("guidance", "primal", "tangent", "backward")
RECOMPUTED = 1 / 5
"""Of attention's backward: of its five products one is the forward's again, which keeps no probabilities."""
META = torch.device("meta")


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of matrix products; fractions in a mean."""

    linear: float = 0
    attention: float = 0

    @property
    def total(self) -> float:
        """FLOPs of both kinds."""
        return self.linear + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.linear + other.linear, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Flops":
        return Flops(self.linear * factor, self.attention * factor)

    def __sub__(self, other: "Flops") -> "Flops":
        return self + other * -1


def count(fn: Callable[[], object]) -> Flops:
    """The FLOPs of a call, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        fn()
    by_operator = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in by_operator.items() if op.startswith("meanflow_kernels.attention"))
    return Flops(sum(by_operator.values()) - attention, attention)


class MetaStep:
    """A run's step on meta tensors with the kernels' route: counted or traced, never computed.

    Args:
        config: of the run; its batch is a rank's.
    """

    def __init__(self, config: RunConfig):
        self.config, batch, model = config, config.train.batch, config.model
        with META:
            self.net = build_net(model, torch.bfloat16 if config.train.precision == "bf16" else None)
            self.x, self.e = torch.empty(2, batch, model.in_channels, model.input_size, model.input_size)
            self.r, self.t = torch.empty(2, batch)
            self.y = torch.empty(batch, dtype=torch.long)
            self.drop = torch.empty(batch, dtype=torch.bool)
        self.planner = Planner(config.objective, batch)

    def loss(self, plan: Plan) -> Tensor:
        """The objective of a plan."""
        inputs, guidance = (self.x, self.e, self.r, self.t, self.y, self.drop), GuidanceInputs(*[self.t] * 3)
        with force_route(Route.TRITON):
            return meanflow_terms(self.config.objective, self.net, *inputs, plan.to(META), guidance).loss

    def flow_matching_loss(self) -> Tensor:
        """The flow matching loss of the same network, its heads and batch: one plain forward with r = t."""
        heads = {"head": "uv"} if self.config.objective.direction == "v_head" else {}
        with force_route(Route.TRITON):
            out = self.net(self.x, self.t, self.t, self.y, **heads)
        return sum((each - (self.e - self.x)).square().mean() for each in (out if heads else (out,)))

    def plain_forward(self) -> Flops:
        """F: FLOPs of one plain forward of the network on the batch."""
        with force_route(Route.TRITON), torch.no_grad():
            return count(lambda: self.net(self.x, self.r, self.t, self.y))

    def forward(self, guidance_size: int, tangent_size: int) -> Flops:
        """FLOPs of a step of these sizes without its backward."""
        return count(lambda: self.loss(self.planner.example(guidance_size, tangent_size)))

    def passes(self, guidance_size: int, tangent_size: int, bare: dict[int, Flops]) -> dict[str, Flops]:
        """FLOPs of each pass of a step; ``bare``: of forwards without guidance, by the size of their tangent."""
        roots = []
        forward = count(lambda: roots.append(self.loss(self.planner.example(guidance_size, tangent_size))))
        backward = count(lambda: roots.pop().backward())
        self.net.zero_grad()
        without = bare[tangent_size]
        return dict(zip(PASSES, (forward - without, bare[0], without - bare[0], backward), strict=True))


class ExactPlanner(Planner):
    """A planner for which every size is declared: nothing is padded."""

    def _guidance_sizes(self) -> tuple[int, ...]:
        return (0, *super()._guidance_sizes())

    def _multiples(self, most: int) -> tuple[int, ...]:
        return tuple(range(most + 1))


def plan_sizes(config: RunConfig, planner: Planner, step: int, rank: int) -> tuple[int, int]:
    """Rows of the guidance forward and of the derivative, for a drawn batch of a rank."""
    batch = config.train.batch
    draws = Draws(config.train.seed, step, torch.arange(rank * batch, (rank + 1) * batch))
    r, t = draw_times(config.objective, draws)
    drop = drop_mask(config.objective, draws.uniform(Purpose.LABEL_DROP))
    plan = planner.plan(r, t, drop, draw_guidance(config.objective, draws, r == t))
    return len(plan.rows), len(plan.tangent)


def saved_bytes(loss: Callable[[], Tensor], net: nn.Module) -> int:
    """Bytes that autograd holds when the backward of loss() starts, by storage, without parameters and buffers."""
    alive = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def pack(tensor: Tensor) -> Saved:
        # detached, because an output that keeps its own graph would keep it for ever
        saved = Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        root = loss()
    # what a graph without the loss has saved is gone by now
    held = {id(s): s for s in (saved.tensor.untyped_storage() for saved in alive)}
    own = {id(s): s for s in (x.untyped_storage() for x in (*net.parameters(), *net.buffers()))}
    assert root.requires_grad
    return sum(storage.nbytes() for key, storage in held.items() if key not in own)


def mean(flops: Iterable[Flops]) -> Flops:
    """The mean of some counts."""
    flops = list(flops)
    return sum(flops, Flops()) * (1 / len(flops))


def account(config: RunConfig, *, ranks: int = 1, batches: int = BATCHES) -> dict:
    """The accounts of a run's step, as plain values for JSON.

    Args:
        config: its train.batch is a rank's. ranks: rank k draws samples k batch ... (k + 1) batch - 1.
        batches: of the means.

    Raises:
        UserError: for no ranks or batches.
    """
    require(ranks >= 1, "ranks", ranks, "a positive whole number", "1 is a process alone")
    require(batches >= 1, "batches", batches, "a positive whole number", f"the usual number is {BATCHES}")
    step = MetaStep(config)
    planner, forward = step.planner, step.plain_forward()
    sizes = [(guidance, tangent) for guidance in planner.guidance_sizes for tangent in planner.tangent_sizes]
    most = sizes[-1]
    counted = step.passes(*most, {tangent: step.forward(0, tangent) for tangent in {0, most[1]}})
    passes = {size: _of_sizes(counted, most, size) for size in sizes}
    total = {size: sum(by_pass.values(), Flops()) for size, by_pass in passes.items()}

    exact_planner = ExactPlanner(config.objective, config.train.batch)
    padded, exact, slowest = [], [], []
    for index in tqdm(range(batches), desc="drawing batches", unit="batch"):
        drawn = [plan_sizes(config, planner, index, rank) for rank in range(ranks)]
        padded.append(drawn[0])
        slowest.append(max(total[size].total for size in drawn))
        of_rows = _of_sizes(counted, most, plan_sizes(config, exact_planner, index, 0))
        exact.append(sum(of_rows.values(), Flops()))
    means = {each: mean(passes[size][each] for size in padded) for each in PASSES}
    used = Counter(padded)

    def units(flops: Flops) -> dict:
        values = {"flops": flops.total, "linear": flops.linear, "attention": flops.attention}
        return values | {"forwards": flops.total / forward.total}

    whole = units(sum(means.values(), Flops()))
    return {
        "batch": config.train.batch,
        "precision": config.train.precision,
        "batches": batches,
        "forward_flops": forward.total,
        "forward_attention_flops": forward.attention,
        "step_flops": whole["flops"],
        "step_in_forwards": whole["forwards"],
        "step_in_forwards_unpadded": mean(exact).total / forward.total,
        "step_in_forwards_unrepeated": (whole["flops"] - RECOMPUTED * means["backward"].attention) / forward.total,
        "ranks": ranks,
        "step_in_forwards_slowest_rank": sum(slowest) / batches / forward.total,
        "parts": {each: units(flops) for each, flops in means.items()},
        "step": whole,
        "sizes": [
            {"guidance": size[0], "tangent": size[1], "batches": used[size]} | units(total[size]) for size in sizes
        ],
        **_memory(step),
    }


def _of_sizes(passes: dict[str, Flops], counted: tuple[int, int], sizes: tuple[int, int]) -> dict[str, Flops]:
    """The passes of a step of other sizes: the FLOPs of guidance and tangent are proportional to their rows."""
    shares = {each: n / max(m, 1) for each, n, m in zip(("guidance", "tangent"), sizes, counted, strict=True)}
    return {each: flops * shares.get(each, 1) for each, flops in passes.items()}


def _memory(step: MetaStep) -> dict:
    planner = step.planner
    plan = planner.example(planner.guidance_sizes[-1], planner.tangent_sizes[-1])
    parameters = sum(p.numel() for p in step.net.parameters())
    return {
        "saved_bytes": saved_bytes(lambda: step.loss(plan), step.net),
        "saved_bytes_flow_matching": saved_bytes(step.flow_matching_loss, step.net),
        "parameters": parameters,
        "parameter_bytes": sum(p.nbytes for p in step.net.parameters()),
        "optimizer_bytes": adamw_ema_bytes(parameters, emas=1, copies=False),
        # two moments and the average, in fp32
        "optimizer_state_bytes": 3 * 4 * parameters,
    }
