"""Accounts of a step: FLOPs of each pass, and bytes kept for the backward."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from meanflow.config import RunConfig
from meanflow.errors import require
from meanflow.method.contract import Objective, Plan, Sizes
from meanflow.method.passes import Pass, Passes
from meanflow.model.build import build_net
from meanflow.objectives.build import make_objective
from meanflow_kernels.adamw_ema import adamw_ema_bytes
from meanflow_kernels.routing import Route, force_route

BATCHES = 1000
"""Number of drawn batches that a mean is taken over."""
TRAINED, TANGENT, BACKWARD = "primal", "tangent", "backward"
"""The accounts' parts beside the passes that are not trained, each of all passes together."""
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


class CountedPasses(Passes):
    """Passes that count themselves, by part of the accounts."""

    def __init__(self, declared: dict[str, Pass], *nets: nn.Module, **options):
        super().__init__(declared, *nets, **options)
        self.flops: dict[str, Flops] = {}

    def _run(self, name: str, primals: tuple, others: tuple, tangents: tuple | None):
        run, declared, results = super()._run, self._declared[name], []
        whole = primal = count(lambda: results.append(run(name, primals, others, tangents)))
        if declared.tangents:
            with torch.no_grad():
                primal = count(lambda: run(name, primals, others, None))
        for part, flops in ((TRAINED if declared.trained else name, primal), (TANGENT, whole - primal)):
            self.flops[part] = self.flops.get(part, Flops()) + flops
        return results[0]


class MetaStep:
    """A run's step on meta tensors with the kernels' route: counted or traced, never computed.

    Args:
        config: of the run; its batch is a rank's. ranks: processes that train together.
    """

    def __init__(self, config: RunConfig, ranks: int = 1):
        self.config, batch, model = config, config.train.batch, config.model
        with META:
            self.net = build_net(model, torch.bfloat16 if config.train.precision == "bf16" else None)
            self.x, self.e = torch.empty(2, batch, model.in_channels, model.input_size, model.input_size)
            self.t = torch.empty(batch)
            self.y = torch.empty(batch, dtype=torch.long)
        train = replace(config.train, batch=batch * ranks, groups=ranks, accumulate=1)
        self.objective: Objective = make_objective(replace(config, train=train), ranks)
        self.average = deepcopy(self.net).requires_grad_(False) if self.objective.takes_average else None
        self.drawn = _on_meta(self.objective.drawn(config.train.seed, 0, 0))

    def loss(self, plan: Plan, kind: type[Passes] = Passes, **options) -> Tensor:
        """The objective of a plan."""
        return self.terms(plan, kind, **options)[0].loss

    def terms(self, plan: Plan, kind: type[Passes] = Passes, **options) -> tuple[Any, Any]:
        """The terms of a plan, and the passes that made them; kind and options: of the passes."""
        passes = kind(self.objective.passes(plan.sizes), self.net, self.average, **options)
        with force_route(Route.TRITON):
            terms = self.objective.terms(passes, self.x, self.e, self.y, self.drawn, _on_meta(plan))
        passes.finish()
        return terms, passes

    def flow_matching_loss(self) -> Tensor:
        """The flow matching loss of the same network, its heads and batch: one plain forward with r = t."""
        declared = self.objective.passes(self.objective.declared[0]).values()
        heads = {"head": "uv"} if any(each.head == "uv" for each in declared) else {}
        with force_route(Route.TRITON):
            out = self.net(self.x, self.t, self.t, self.y, **heads)
        return sum((each - (self.e - self.x)).square().mean() for each in (out if heads else (out,)))

    def plain_forward(self) -> Flops:
        """F: FLOPs of one plain forward of the network on the batch."""
        with force_route(Route.TRITON), torch.no_grad():
            return count(lambda: self.net(self.x, self.t, self.t, self.y))

    def parts(self, sizes: Sizes) -> dict[str, Flops]:
        """FLOPs of a step of these sizes: of each pass that is not trained, of those that are, of their derivatives and
        backward.
        """
        terms, passes = self.terms(self.objective.example(sizes), CountedPasses)
        backward = count(terms.loss.backward)
        self.net.zero_grad()
        return passes.flops | {BACKWARD: backward}


def _on_meta(tensors: Any) -> Any:
    return pytree.tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, tensors)


def rows_of(passes: dict[str, Pass]) -> dict[str, int]:
    """The rows of each part of a step's accounts, to which its FLOPs are proportional."""
    trained = sum(each.rows for each in passes.values() if each.trained)
    tangents = sum(each.tangents for each in passes.values())
    rows = {name: each.rows for name, each in passes.items() if not each.trained}
    return rows | {TRAINED: trained, TANGENT: tangents, BACKWARD: trained}


class Proportional:
    """A step's parts in all sizes, from as few counts as there are parts: each costs what its rows cost."""

    def __init__(self, step: MetaStep):
        self._objective = step.objective
        self._of_a_row: dict[str, tuple[Flops, int]] = {}
        for sizes in step.objective.declared:
            rows = rows_of(step.objective.passes(sizes))
            self._of_a_row |= dict.fromkeys(rows.keys() - self._of_a_row.keys(), (Flops(), 1))
            if new := [part for part, n in rows.items() if n and not self._of_a_row[part][0].total]:
                parts = step.parts(sizes)
                self._of_a_row |= {part: (parts[part], rows[part]) for part in new}

    def parts(self, sizes: Sizes) -> dict[str, Flops]:
        """FLOPs by part of a step of any sizes, declared or exact."""
        rows = rows_of(self._objective.passes(sizes))
        return {part: flops * (rows[part] / n) for part, (flops, n) in self._of_a_row.items()}


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
    step = MetaStep(config, ranks)
    objective, forward, proportional = step.objective, step.plain_forward(), Proportional(step)
    parts = {sizes: proportional.parts(sizes) for sizes in objective.declared}
    total = {sizes: sum(by_part.values(), Flops()) for sizes, by_part in parts.items()}

    padded, exact, slowest = [], [], []
    for index in tqdm(range(batches), desc="drawing batches", unit="batch"):
        drawn = [objective.drawn(config.train.seed, index, rank) for rank in range(ranks)]
        padded.append(objective.sizes(drawn[0]))
        slowest.append(max(total[objective.sizes(each)].total for each in drawn))
        exact.append(sum(proportional.parts(objective.sizes(drawn[0], exact=True)).values(), Flops()))
    names = rows_of(objective.passes(objective.declared[0]))
    means = {each: mean(parts[sizes][each] for sizes in padded) for each in names}
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
        "step_in_forwards_unrepeated": (whole["flops"] - RECOMPUTED * means[BACKWARD].attention) / forward.total,
        "ranks": ranks,
        "step_in_forwards_slowest_rank": sum(slowest) / batches / forward.total,
        "parts": {each: units(flops) for each, flops in means.items()},
        "step": whole,
        "sizes": [{"sizes": sizes, "batches": used[sizes]} | units(total[sizes]) for sizes in objective.declared],
        **_memory(step),
    }


def _memory(step: MetaStep) -> dict:
    plan = step.objective.example(step.objective.declared[0])
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
