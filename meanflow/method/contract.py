"""What an objective is to the trainer, and the module that makes its passes.

On the host an objective draws what a batch needs beside data and noise, and plans the batch: the sizes of a few groups
of rows are chosen among the declared ones, and index tensors of these sizes say which sample is where. On the device
`terms` mixes the results of the passes, whose number, order and rows follow from the sizes. So a step's shapes, FLOPs
and bytes are known before it runs, and all shapes of a run before its first step: a phase of a schedule has sizes of
its own.
"""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..draws import Draws
from .microbatch import BatchSplit
from .passes import Pass, Passes

Sizes = tuple[int, ...]
"""The rows of each of an objective's groups, which decide a step's shapes."""
Figures = dict[str, tuple[Tensor, Tensor | None]]
"""What the log takes means of: terms (n,), and which of them count (n,) bool, or None for all."""


class Plan(Protocol):
    """Which samples of a batch need which pass: a NamedTuple of tensors, and None where there is nothing to say."""

    @property
    def sizes(self) -> Sizes:
        """Rows of each group, read from the tensors' shapes."""
        ...


class Terms(Protocol):
    """The results of a batch: a NamedTuple of tensors, and None where there is nothing to say."""

    @property
    def loss(self) -> Tensor:
        """The scalar to differentiate."""
        ...

    def _replace(self, **fields: Any) -> "Terms": ...


class Objective(ABC):
    """An objective, for micro-batches of one size. Drawn stands for a NamedTuple of its own, with a row a sample.

    Args:
        config: its options.
        batch: samples of a step, in groups (a device's batch, officially) and micro-batches (of all processes).
        steps: of the whole run, for schedules.

    Raises:
        UserError: for a batch that does not divide.
    """

    set_size = 1
    """Samples that are dealt whole to a micro-batch, neighbours in the global batch."""
    phased = False
    """Whether what a step costs changes in the course of the run."""
    watched: dict[str, str] = {}
    """Terms (B,) whose means the guard watches, and what to call them; the first one stands beside the progress."""
    logged: tuple[str, ...] = ()
    """Names of the means that are logged, each of any number of samples: those of terms, or of `figures`."""

    def __init__(self, config: Any, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        self.config, self.steps = config, steps
        self.split = BatchSplit(batch, groups, micro_batches, self.set_size)
        self.batch = self.split.micro_batch_size
        """Samples B of a micro-batch."""
        # micro-batches share groups
        self._group = lru_cache(groups)(self._draw_group)

    # --- draws ---

    @abstractmethod
    def draw(self, draws: Draws) -> Any:
        """Draw what a group's samples need beside data and noise: a Drawn, on the CPU.

        draws.step / self.steps says how far the run is. The rules of the official codes for "the first samples of a
        device's batch" are those of a group.
        """

    def _draw_group(self, seed: int, step: int, group: int) -> Any:
        size = self.split.group_size
        return self.draw(Draws(seed, step, torch.arange(group * size, (group + 1) * size)))

    def drawn(self, seed: int, step: int, micro_batch: int) -> Any:
        """The Drawn of a micro-batch of this process or another."""
        samples, size = self.split.samples(micro_batch), self.split.group_size
        groups = (samples // size).unique()
        place = torch.searchsorted(groups, samples // size) * size + samples % size
        parts = [self._group(seed, step, group) for group in groups.tolist()]
        return pytree.tree_map(lambda *x: torch.cat(x)[place] if isinstance(x[0], Tensor) else x[0], *parts)

    # --- plans ---

    @property
    @abstractmethod
    def declared(self) -> tuple[Sizes, ...]:
        """All sizes that any batch of the run may get, the largest first: memory that fits it fits the others."""

    def need(self, drawn: Any, sizes: Sizes) -> int:
        """The rows that a batch needs of the next group, where those before it have these sizes."""
        return self.declared[0][len(sizes)]

    def sizes(self, *drawn: Any, exact: bool = False) -> Sizes:
        """The smallest declared sizes that serve all of these batches, or exactly those that they need."""
        sizes: Sizes = ()
        while len(sizes) < len(self.declared[0]):
            rows = max(self.need(each, sizes) for each in drawn)
            if not exact:
                possible = {each[len(sizes)] for each in self.declared if each[: len(sizes)] == sizes}
                rows = min(size for size in possible if size >= rows)
            sizes += (rows,)
        return sizes

    def plan(self, drawn: Any, *others: Any, exact: bool = False) -> Any:
        """Plan a batch, with sizes that serve the batches of others too, who run the same step at the same time.

        exact: nothing is padded to a declared size.
        """
        return self.arrange(drawn, self.sizes(drawn, *others, exact=exact))

    @abstractmethod
    def arrange(self, drawn: Any, sizes: Sizes) -> Any:
        """The plan of a batch with sizes that serve it, on the CPU."""

    @abstractmethod
    def example(self, sizes: Sizes) -> Any:
        """A plan of given sizes, to compile or count a step with; its indices are arbitrary."""

    def dynamic(self, plan: Any) -> list[Tensor]:
        """The plan's tensors whose size one compiled graph may leave open; the others are compiled size by size."""
        return []

    # --- the step ---

    @abstractmethod
    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """The passes of a step of these sizes, in order. Sizes may be symbols of a compiler: compare none to a number
        but 0.
        """

    @abstractmethod
    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Any, plan: Any) -> Any:
        """Loss and figures of a batch, by the passes; compiled as one graph, without a branch on a tensor's values.

        Args:
            x, e: data and noise (B, channels, height, width). y: labels (B,) int64.
        """

    @property
    def takes_average(self) -> bool:
        """Whether a pass takes the average of the weights."""
        return any(each.weights == "average" for each in self._all_passes())

    @property
    def takes_fp32(self) -> bool:
        """Whether a pass runs in fp32 throughout."""
        return any(each.precision == "fp32" for each in self._all_passes())

    def _all_passes(self) -> list[Pass]:
        return [each for sizes in self.declared for each in self.passes(sizes).values()]

    # --- the log ---

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Names of the log's sums in their order, which is that of checkpoints: loss, grad_norm, steps and skipped are
        the log's own, and `sums` has the others.
        """
        return ("steps", "loss", *self.logged, *(f"{name}_samples" for name in self.logged), "grad_norm", "skipped")

    def figures(self, terms: Any) -> Figures:
        """What the log takes means of, by the names of `logged`: the terms of these names."""
        return {name: (getattr(terms, name), None) for name in self.logged}

    def sums(self, terms: Any) -> dict[str, Tensor]:
        """The addends of a micro-batch, () each."""
        sums, counts = {}, {}
        for name, (x, who) in self.figures(terms).items():
            sums[name] = (x if who is None else torch.where(who, x, 0)).sum().double()
            count = torch.full((), float(len(x)), device=x.device) if who is None else who.sum().double()
            counts[f"{name}_samples"] = count
        return sums | counts

    def columns(self, sums: dict[str, float]) -> dict[str, float | None]:
        """The log's columns of an interval's sums; None where nothing was added up."""
        counts = {name: sums[f"{name}_samples"] for name in self.logged}
        return {name: sums[name] / count if count else None for name, count in counts.items()}


class ObjectiveLoss(nn.Module):
    """An objective's terms as one module, so that all passes of a step are one call to compile, or to wrap in DDP.

    Args:
        objective: of these networks. net: in training.
        average: of its weights, for an objective that takes it; it is not trained.
    """

    def __init__(self, objective: Objective, net: nn.Module, average: nn.Module | None = None):
        super().__init__()
        self.objective, self.net = objective, net
        # a tuple keeps it out of the module's parameters
        self._average = (average,)

    def forward(self, x: Tensor, e: Tensor, y: Tensor, drawn: Any, plan: Any) -> Any:
        """The terms of a batch, as `Objective.terms` says."""
        passes = Passes(self.objective.passes(plan.sizes), self.net, self._average[0])
        terms = self.objective.terms(passes, x, e, y, drawn, plan)
        passes.finish()
        return terms
