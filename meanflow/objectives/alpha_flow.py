"""The objective of alpha-Flow (arXiv 2510.20771): from trajectory flow matching to MeanFlow as alpha goes from 1 to 0.

    z = (1 - t) x + t e,  v = e - x
    v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t)        start < t < end, else v
    alpha = 1 - sigmoid(25 p),  p from -1/2 to 1/2                               of the steps between start and end
    r = t:              u_tgt = v_g
    alpha = 1:          u_tgt = clip(v_g)
    0 < alpha < 1:      d = alpha (t - r)
                        u_tgt = clip(alpha v_g + (1 - alpha) u(z - d v_g, r, t - d | y))
    alpha = 0:          u, du_dt = jvp(u, (z, r, t), (v_g, 0, 1)),  u_tgt = v_g - (t - r) du_dt
    raw = mean (u(z, r, t | y) - sg(u_tgt))^2
    loss = mean(w raw / sg(raw + c)),  w = alpha where r < t and alpha > 0, else 1

Labels are dropped where start < t < end alone, and before all else: without one, y is the null class in every line, and
v_g = omega v + (1 - omega) u(z, t, t). alpha below 0.005 is 0, above 0.995 it is 1. The three phases are sizes of their
own: none has a pass that it does not need. x is data, e noise. Tensors are (B, channels, height, width), times and
losses (B,); raw is a mean over a sample's elements.
"""

from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method.contract import Figures, Objective, Sizes
from ..method.passes import Pass, Passes
from ..method.times import column, draw_times, equal_prefix
from ..recipes.flow import AlphaFlowConfig
from .meanflow_plan import Plan as GuidancePlan
from .meanflow_plan import Predictions

RATE = 25.0
"""Of alpha's sigmoid."""
LEAST = 0.005
"""alpha below it is 0, and above 1 - LEAST it is 1."""
SIZES_PER_BATCH = 16
"""Predictions grow in steps of a sixteenth of the batch: padding costs a thirty-second of a forward pass on average."""
MOST_SIZES = 10
"""Sizes of a phase."""
STEPS_LOOKED_AT = 16
"""Steps whose draws show how many predictions are likely: fewer or more get no size of their own, but the largest."""


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, (B,) each."""

    r: Tensor
    t: Tensor
    drop: Tensor
    """Who trains on the null class, bool."""
    alpha: Tensor
    """The same for all."""


class Plan(NamedTuple):
    """The phase, and which sample needs which prediction."""

    guidance: GuidancePlan
    """The rows of the predictions, and in the last phase the samples with a derivative; the order is the batch's."""
    between: Tensor
    """The last samples, which get a pass from t - d where 0 < alpha < 1 (n,) int64. Only its length is read."""

    @property
    def sizes(self) -> Sizes:
        """Samples with a derivative, with a pass from t - d, and rows of the predictions."""
        return len(self.guidance.tangent), len(self.between), len(self.guidance.rows)


class AlphaFlowTerms(NamedTuple):
    """Loss and figures of a batch."""

    loss: Tensor
    raw: Tensor
    """Mean squared error of a sample (B,)."""
    weight: Tensor
    """Its factor w / (raw + c) (B,)."""
    alpha: Tensor
    """(B,)."""
    equal: Tensor
    """Whether r = t (B,) bool."""
    u: Tensor
    u_tgt: Tensor
    v_g: Tensor


def alpha_at(config: AlphaFlowConfig, step: int, steps: int) -> float:
    """alpha of a training step, of so many."""
    start, end = round(config.anneal_start * steps), round(config.anneal_end * steps)
    if not start <= step < end:
        return float(step < start)
    alpha = 1 / (1 + exp(RATE * ((step - start) / (end - start) - 0.5)))
    return 0.0 if alpha < LEAST else 1.0 if alpha > 1 - LEAST else alpha


class AlphaFlow(Objective):
    """alpha-Flow as the trainer's objective."""

    config: AlphaFlowConfig
    phased = True
    watched = {"raw": "raw loss"}
    logged = ("raw", "raw_equal", "raw_unequal", "weight", "alpha")

    def __init__(self, config: AlphaFlowConfig, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        super().__init__(config, batch, groups, micro_batches, steps)
        self._shared = config.meanflow()
        prefix = equal_prefix(self._shared, self.split.group_size)
        # of all micro-batches, which have the same shapes: one more of the last samples may have r = t
        self._tail = self.batch - min(self.split.prefix(prefix, each) for each in range(micro_batches))
        first, last = (alpha_at(config, step, steps) for step in (0, steps - 1))
        phases = {self._phase(alpha) for alpha in {first, last, 0.5 if last < 0.5 < first else first}}
        sizes = {(*phase, rows) for phase in phases for rows in self._prediction_sizes()}
        self._declared = tuple(sorted(sizes, reverse=True))

    def _phase(self, alpha: float) -> Sizes:
        """Samples with a derivative, and with a pass from t - d."""
        return (self._tail if alpha == 0 else 0, self._tail if 0 < alpha < 1 else 0)

    def _prediction_sizes(self) -> set[int]:
        if not self._shared.guided:
            return {0}
        most = self.batch + (self._tail if self._shared.mixes_conditional else 0)
        needs = [self.need(self.drawn(0, step, 0), (0, 0)) for step in range(STEPS_LOOKED_AT)]
        least, largest = min(needs), max(needs)
        granule = max(2, -(-self.batch // SIZES_PER_BATCH), -(-(largest - least) // (MOST_SIZES - 3)))
        # none is 0: under FSDP all processes must make the same passes
        likely = range(max(least // granule, 1) * granule, largest + granule, granule)
        return {min(count, most) for count in likely} | {most}

    # --- the host's part ---

    def draw(self, draws: Draws) -> Drawn:
        """Draw times and dropped labels; alpha is the step's."""
        r, t = draw_times(self._shared, draws)
        drop = (draws.uniform(Purpose.LABEL_DROP) < self.config.label_drop) & self._inside(t)
        # where the guard went back, positions go on beyond the run's steps
        alpha = alpha_at(self.config, min(draws.step, self.steps - 1), self.steps)
        return Drawn(r, t, drop, torch.full_like(t, alpha))

    def _inside(self, t: Tensor) -> Tensor:
        return (self.config.guidance_start < t) & (t < self.config.guidance_end)

    def _masks(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Who needs the prediction without a label, and who that with it before the trained pass (B,) bool."""
        shared = self._shared
        guided = self._inside(drawn.t) & shared.guided
        if shared.omega == 1:
            guided &= ~drawn.drop
        derived = torch.arange(self.batch) >= self.batch - self._tail
        return guided, guided & ~drawn.drop & derived & shared.mixes_conditional

    @property
    def declared(self) -> tuple[Sizes, ...]:
        """Sizes of the phases that the run comes to, each with those of the predictions."""
        return self._declared

    def need(self, drawn: Drawn, sizes: Sizes) -> int:
        """Samples with a derivative, then with a pass from t - d, then rows of the predictions."""
        if len(sizes) < 2:
            return self._phase(float(drawn.alpha[0]))[len(sizes)]
        return sum(int(each.sum()) for each in self._masks(drawn))

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """The plan of these sizes."""
        guided, conditional = self._masks(drawn)
        sample = torch.arange(self.batch)
        rows, nulls = torch.cat([sample[guided], sample[conditional]]), int(guided.sum())
        null_row = torch.zeros_like(sample)
        null_row[guided] = torch.arange(nulls)
        # where r = t the trained pass is the conditional prediction, and without a label there is one prediction
        cond_row = torch.where(drawn.drop, null_row, -1)
        cond_row[conditional] = torch.arange(nulls, len(rows))
        rows = torch.cat([rows, rows.new_zeros(sizes[2] - len(rows))])
        null = torch.arange(sizes[2]) < nulls
        return self._plan(sizes, guided=guided, rows=rows, null=null, null_row=null_row, cond_row=cond_row)

    def example(self, sizes: Sizes) -> Plan:
        """A plan of given sizes."""
        sample, rows = torch.arange(self.batch), torch.arange(sizes[2]) % self.batch
        row = sample % max(sizes[2], 1)
        cond_row = torch.where(sample < self.batch - self._tail, -1, row)
        return self._plan(sizes, guided=row >= 0, rows=rows, null=rows >= 0, null_row=row, cond_row=cond_row)

    def _plan(self, sizes: Sizes, **guidance: Tensor) -> Plan:
        tangent, between = (torch.arange(self.batch - count, self.batch) for count in sizes[:2])
        return Plan(GuidancePlan(tangent=tangent, order=None, **guidance), between)

    def dynamic(self, plan: Plan) -> list[Tensor]:
        """One compiled graph of each phase serves all sizes of the predictions."""
        several = len({sizes[2] for sizes in self._declared}) > 1
        return [plan.guidance.rows, plan.guidance.null] if several else []

    # --- the step ---

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """Predictions of the velocity, the pass from t - d, and the trained one, with a derivative where alpha is 0."""
        tangents, between, rows = sizes
        trained = Pass(self.batch, tangents, trained=True)
        return {"guidance": Pass(rows), "between": Pass(between), "primal": trained}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> AlphaFlowTerms:
        """See the module."""
        r, t, drop, alpha = drawn
        head, tail = slice(0, self.batch - self._tail), slice(self.batch - self._tail, None)
        labels, equal = torch.where(drop, passes.null_label, y), r == t
        z, v = (1 - column(t, x)) * x + column(t, x) * e, e - x
        predictions = Predictions.make(self._shared, passes, z, t, y, None, plan.guidance)
        v_g_tail = predictions.guided(v, tail)
        gap = column((t - r)[tail], x)

        # the target of the last samples, by the phase
        if len(plan.guidance.tangent):
            tangents = (v_g_tail, None, torch.ones_like(t[tail]))
            u, du_dt = passes("primal", z, r, t, labels, tangents=tangents)
            target = v_g_tail - gap * du_dt.detach()
        else:
            target = v_g_tail
            if len(plan.between):
                share = column(alpha[tail], x)
                nearer = (t - alpha * (t - r))[tail]
                u_next = passes("between", z[tail] - share * gap * v_g_tail, r[tail], nearer, labels[tail])
                target = share * v_g_tail + (1 - share) * u_next
            target = target.clamp(-self.config.clip, self.config.clip)
            u = passes("primal", z, r, t, labels)

        # where r = t the trained pass is the conditional prediction
        v_g = torch.cat([predictions.guided(v, head, u.detach()[head]), v_g_tail])
        u_tgt = torch.cat([v_g[head], torch.where(column(equal[tail], x), v_g_tail, target)])
        raw = (u - u_tgt).square().flatten(1).mean(1)
        weight = torch.where(equal | (alpha == 0), 1, alpha) / (raw.detach() + self.config.norm_c)
        return AlphaFlowTerms((weight * raw).mean(), raw.detach(), weight, alpha, equal, u.detach(), u_tgt, v_g)

    def figures(self, terms: AlphaFlowTerms) -> Figures:
        """Of all samples, of those with r = t, and of the others."""
        raw, equal = terms.raw, terms.equal
        of_all = {name: (getattr(terms, name), None) for name in ("raw", "weight", "alpha")}
        return {**of_all, "raw_equal": (raw, equal), "raw_unequal": (raw, ~equal)}
