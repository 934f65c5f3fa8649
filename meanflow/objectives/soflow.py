"""The objective of SoFlow (arXiv 2512.15657): the solution of the flow's equation, learned without a derivative.

    f(z, t, s) = z + (s - t) u(z, s, t)                                      Euler parametrisation
    v_g = v + kappa(t) (omega - 1) (v - u(z, t, t))                          guidance, not where the label is dropped
    v_m = m v_g + (1 - m) sg(u(z, t, t | y))                                 mixed velocity
    velocity samples:       raw = mean (u(z, t, t | y) - v_m)^2,  loss = w raw
    consistency samples:    l = t + (s - t) ratio(progress),  z_l = z + (l - t) v_m
                            D = sg(f(z, t, s) - f(z_l, l, s)) / (t - l),  raw = mean D^2
                            loss = sign(s - t) w mean u(z, s, t | y) D
    w = 1 / sg(raw + c)^p,  loss = mean over all samples

x is data, e noise, z = (1 - t) x + t e, v = e - x, s <= l < t. A consistency sample's loss has the gradient of
w / 2 raw (t - l) / |s - t|; its value means nothing. u of a dropped label is of the null class and takes the plain v.
Means are over a sample's elements. Tensors are (B, channels, height, width), times and losses (B,).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..draws import Draws, Purpose
from ..method.contract import Figures, Objective, Sizes
from ..method.passes import Pass, Passes
from ..method.times import column
from ..recipes.flow import SoFlowConfig

MOST_REMAINING = 1 - 1e-6
"""Where guidance begins to decay it has not yet: officially, what remains of the time is at most this."""
SIZES_PER_BATCH = 16
"""The prediction's rows grow in steps of a sixteenth of the batch: padding costs a fortieth of a forward pass."""


class Drawn(NamedTuple):
    """What is drawn for a batch beside data and noise, (B,) each."""

    s: Tensor
    """Time to which the flow is solved; t of a velocity sample."""
    l: Tensor
    """Time between, from which it is solved too; t of a velocity sample."""
    t: Tensor
    velocity: Tensor
    """Who learns the velocity, bool."""
    drop: Tensor
    """Who trains on the null class, bool."""


class Plan(NamedTuple):
    """The rows of the prediction pass, for B samples."""

    guided: Tensor
    """Whose velocity is guided and mixed (B,) bool."""
    rows: Tensor
    """The sample of each row (G,) int64. Padding repeats one."""
    null: Tensor
    """Whether a row is of the null class (G,) bool."""
    null_row: Tensor
    """The row of a guided sample's u(z, t, t) (B,) int64."""
    cond_row: Tensor
    """The row of a guided consistency sample's u(z, t, t | y) (B,) int64; a velocity sample's is its trained pass."""

    @property
    def sizes(self) -> Sizes:
        """Rows of the prediction pass."""
        return (len(self.rows),)


class Terms(NamedTuple):
    """Loss and figures of a batch."""

    loss: Tensor
    raw: Tensor
    """Mean squared error of a sample, against its target or of D (B,)."""
    weight: Tensor
    """w (B,)."""
    velocity: Tensor
    """Who learns the velocity (B,) bool."""
    u: Tensor
    v_g: Tensor
    """The guided velocity (B, ...)."""
    v_m: Tensor
    """The mixed velocity (B, ...), which is a velocity sample's target."""
    z_l: Tensor
    """Of the last samples, which may be consistency's (n, ...)."""
    u_l: Tensor
    """u(z_l, s, l | y) of the same."""


def arrange_times(
    config: SoFlowConfig, a: Tensor, b: Tensor, velocity: Tensor, progress: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal draws for t and s (B,) to the times s, l and t (B,), of a run that has come so far (0 to 1)."""

    def time(normal: Tensor, law: tuple[float, float]) -> Tensor:
        return (normal * law[1] + law[0]).sigmoid()

    gap = config.least_gap
    t = time(a, config.start_time).clamp(min=gap)
    s = torch.minimum(time(b, config.end_time), t - gap)
    between = torch.minimum(t + (s - t) * ratio(config, progress), t - gap)
    alone = time(a, config.velocity_time)
    s, between, t = (torch.where(velocity, alone, x) for x in (s, between, t))
    return s, between, t


def ratio(config: SoFlowConfig, progress: float) -> float:
    """(t - l) / (t - s) of a run that has come so far."""
    first, last = config.ratio_first, config.ratio_last
    match config.ratio_schedule:
        case "exponent":
            return first * (last / first) ** progress
        case "linear":
            return first + (last - first) * progress
        case "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2
    return last


def kappa(config: SoFlowConfig, t: Tensor) -> Tensor:
    """How much of the guidance there is at a time (B,): all of it up to guidance_end, then less, none at t = 1."""
    end = config.guidance_end
    if end == 1:
        return torch.ones_like(t)
    remaining = ((1 - t) / (1 - end)).clamp(max=MOST_REMAINING)
    return torch.where(t <= end, 1, -torch.expm1(-config.guidance_decay * remaining / (1 - remaining)))


class SoFlow(Objective):
    """SoFlow as the trainer's objective."""

    config: SoFlowConfig
    watched = {"raw": "raw loss"}
    logged = ("raw", "raw_velocity", "raw_consistency", "weight")

    def __init__(self, config: SoFlowConfig, batch: int, groups: int = 1, micro_batches: int = 1, steps: int = 1):
        super().__init__(config, batch, groups, micro_batches, steps)
        first = self._velocities(self.split.group_size)
        # of all micro-batches, which have the same shapes: one more sample of the last ones may learn the velocity
        self._tail = self.batch - min(self.split.prefix(first, each) for each in range(micro_batches))
        self._declared = tuple((rows,) for rows in reversed(self._prediction_sizes()))

    def _velocities(self, group: int) -> int:
        return int(group * self.config.velocity_share)

    def _prediction_sizes(self) -> tuple[int, ...]:
        config = self.config
        if not config.guided:
            return (0,)
        most = self.batch + (self._tail if config.mixes else 0)
        if not config.dropped:
            return (most,)
        granule = max(2, -(-self.batch // SIZES_PER_BATCH))
        # fewer rows than are likely get no size of their own: they are seldom, and each size is compiled or captured
        least = max(int(most * (1 - config.dropped)) // granule - 1, 1) * granule
        return (*range(least, most, granule), most)

    def draw(self, draws: Draws) -> Drawn:
        """Draw times and dropped labels."""
        a, b = draws.normal(Purpose.TIME_A), draws.normal(Purpose.TIME_B)
        velocity = torch.arange(len(a)) < self._velocities(len(a))
        times = arrange_times(self.config, a, b, velocity, draws.step / self.steps)
        return Drawn(*times, velocity, draws.uniform(Purpose.LABEL_DROP) < self.config.dropped)

    @property
    def declared(self) -> tuple[Sizes, ...]:
        """Sizes of the prediction pass."""
        return self._declared

    def _masks(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Who needs the prediction without a label, and who that with it, before the trained pass (B,) bool."""
        guided = ~drawn.drop & self.config.guided
        return guided, guided & ~drawn.velocity & self.config.mixes

    def need(self, drawn: Drawn, sizes: Sizes) -> int:
        """Rows of the prediction pass."""
        return sum(int(each.sum()) for each in self._masks(drawn))

    def arrange(self, drawn: Drawn, sizes: Sizes) -> Plan:
        """The plan with so many rows of the prediction pass."""
        guided, conditional = self._masks(drawn)
        sample = torch.arange(self.batch)
        rows, nulls = torch.cat([sample[guided], sample[conditional]]), int(guided.sum())
        null_row, cond_row = torch.zeros_like(sample), torch.zeros_like(sample)
        null_row[guided] = torch.arange(nulls)
        cond_row[conditional] = torch.arange(nulls, len(rows))
        rows = torch.cat([rows, rows.new_zeros(sizes[0] - len(rows))])
        return Plan(guided, rows, torch.arange(sizes[0]) < nulls, null_row, cond_row)

    def example(self, sizes: Sizes) -> Plan:
        """A plan of given sizes."""
        sample, rows = torch.arange(self.batch), torch.arange(sizes[0]) % self.batch
        row = sample % max(sizes[0], 1)
        return Plan(sample < sizes[0], rows, rows >= 0, row, row.clone())

    def dynamic(self, plan: Plan) -> list[Tensor]:
        """One compiled graph serves all sizes."""
        return [plan.rows, plan.null] if len(self._declared) > 1 else []

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """Predictions of the velocity, the solution from the time between, and the trained pass."""
        return {"prediction": Pass(sizes[0]), "between": Pass(self._tail), "primal": Pass(self.batch, trained=True)}

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> Terms:
        """See the module."""
        config, tail = self.config, slice(self.batch - self._tail, None)
        s, l, t = (column(time, x) for time in (drawn.s, drawn.l, drawn.t))
        guided, velocity = (column(mask, x) for mask in (plan.guided, drawn.velocity))
        labels = torch.where(drawn.drop, passes.null_label, y)
        z = (1 - t) * x + t * e
        v = v_g = v_m = e - x

        # guidance; the mixed velocity of those who need it before the trained pass
        predictions = z[:0]
        mixes = config.mixes and len(plan.rows) > 0
        if len(plan.rows) > 0:
            time, of_null = drawn.t[plan.rows], torch.where(plan.null, passes.null_label, y[plan.rows])
            predictions = passes("prediction", z[plan.rows], time, time, of_null)
            scale = column(kappa(config, drawn.t), x) * (config.omega - 1)
            v_g = torch.where(guided, v + scale * (v - predictions[plan.null_row]), v)
            v_m = v_g

        def mixed(samples: slice, v_pred: Tensor) -> Tensor:
            mix = config.mix * v_g[samples] + (1 - config.mix) * v_pred
            return torch.where(guided[samples], mix, v[samples])

        # the solution from t and from l
        v_tail = mixed(tail, predictions[plan.cond_row[tail]]) if mixes else v_g[tail]
        z_l = z[tail] + (l[tail] - t[tail]) * v_tail
        u_l = passes("between", z_l, drawn.s[tail], drawn.l[tail], labels[tail]) if self._tail else z_l
        u = passes("primal", z, drawn.s, drawn.t, labels)
        primal = u.detach()
        f_t = z[tail] + (s[tail] - t[tail]) * primal[tail]
        f_l = z_l + (s[tail] - l[tail]) * u_l
        # nothing is between a velocity sample's times
        delta = (f_t - f_l) / torch.where(velocity[tail], 1, t[tail] - l[tail])

        if mixes:
            head = slice(0, self.batch - self._tail)
            v_tail = torch.where(velocity[tail], mixed(tail, primal[tail]), v_tail)
            v_m = torch.cat([mixed(head, primal[head]), v_tail])

        def of_each(of_velocity: Tensor, of_tail: Tensor) -> Tensor:
            whole = torch.cat([of_velocity[: self.batch - self._tail], of_tail])
            return torch.where(drawn.velocity, of_velocity, whole)

        error = _mean((u - v_m).square())
        raw = of_each(error.detach(), _mean(delta.square()))
        weight = (raw + config.norm_c) ** -config.norm_p
        surrogate = torch.sign(drawn.s - drawn.t)[tail] * _mean(u[tail] * delta)
        loss = weight * of_each(error, surrogate)
        return Terms(loss.mean(), raw, weight, drawn.velocity, primal, v_g, v_m, z_l, u_l)

    def figures(self, terms: Terms) -> Figures:
        """Of all samples, of those who learn the velocity, and of the others."""
        raw, velocity = terms.raw, terms.velocity
        of_all = {"raw": (raw, None), "weight": (terms.weight, None)}
        return {**of_all, "raw_velocity": (raw, velocity), "raw_consistency": (raw, ~velocity)}


def _mean(a: Tensor) -> Tensor:
    """Mean over a sample's elements (B,)."""
    return a.flatten(1).mean(1)
