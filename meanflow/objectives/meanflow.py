"""The objective of MeanFlow (arXiv 2505.13447, Algorithm 1) and of improved MeanFlow (arXiv 2512.02012), by options.

    r, t, e = drawn                                                          section 4.3 (times.py)
    z = (1 - t) x + t e,  v_t = e - x
    v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_null                 Eq. 21; v_t where nothing guides
    u, du_dt = jvp(u, (z, r, t), (v_g, 0, 1))                                Eq. 8
    u_tgt = v_g - (t - r) du_dt                                              Eq. 18 (Eq. 11 without guidance)
    raw = |u - sg(u_tgt)|^2                                                  Eq. 17 (Eq. 9)
    loss = mean(raw / sg(raw + c)^p)                                         Eq. 22

v_c and v_null are the network's predictions u(z, t, t | y) and u(z, t, t). What improved MeanFlow changes:

    v_c = v(z, t | y, omega'),  v_null = v(z, t | omega = 1)                 omega' = omega in an interval, else 1
    v_g = v_t + (1 - 1 / omega') (v_c - v_null)                              both drawn for each sample (guidance.py)
    u, du_dt = jvp(u, (z, r, t), (v_c, 0, 1));  v in the same pass
    V = u + (t - r) sg(du_dt),  S_u = |V - sg(v_g)|^2,  S_v = |v - sg(v_g)|^2
    loss = mean(S_u / sg(S_u + c)^p + S_v / sg(S_v + c)^p)

V - v_g is computed as u - u_tgt: the same number and gradient, with clip_gap or without. x is data, e noise, v_t its
velocity, u the average velocity that the network predicts, v its prediction of the velocity: of a head for it, or
u(z, t, t). sg is stop-gradient. Tensors are (B, channels, height, width), times and losses (B,). The benchmarks'
naive_terms is MeanFlow's without a plan.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..method.contract import Sizes
from ..method.guidance import GuidanceInputs, told_to
from ..method.passes import Jvp, Pass, Passes, pair_jvp
from ..method.times import column
from ..recipe import ObjectiveConfig
from .meanflow_plan import Drawn, Plan, PlannedMeanFlow, Predictions, whole_batch

SUMS = (
    "steps", "samples", "unequal_samples", "loss", "raw", "raw_equal", "raw_unequal", "v_loss", "weight", "du_dt",
    "grad_norm", "skipped",
)  # fmt: skip
V_SUMS = ("raw_v", "weight_v")
"""Of the head for v, where there is one."""


class MeanFlowTerms(NamedTuple):
    """Loss and figures of a step, for its gradient, the log and the tests; samples are in the plan's order."""

    loss: Tensor
    """The scalar to differentiate. With p = 1 it is about 1 whatever the network does, or 2 with a head for v: watch
    raw."""
    raw: Tensor
    """Squared error ||u - sg(u_tgt)||^2, summed over a sample (B,)."""
    weight: Tensor
    """Divisor of raw, sg((raw + c)^p) (B,)."""
    raw_v: Tensor | None
    """Squared error ||v - sg(v_g)||^2 of the head for v (B,); None without one."""
    weight_v: Tensor | None
    """Divisor of raw_v (B,)."""
    v_loss: Tensor
    """||v - v_t||^2 against the unguided velocity, of u where there is no head for v; only logged (B,)."""
    equal: Tensor
    """Whether r = t (B,) bool."""
    u: Tensor
    v: Tensor | None
    du_dt: Tensor
    """The derivative, of the samples from the plan's tangent_start on."""
    direction: Tensor
    """z's direction of it."""
    u_tgt: Tensor
    v_g: Tensor
    """The guided velocity."""


def meanflow_passes(config: ObjectiveConfig, batch: int, sizes: Sizes) -> dict[str, Pass]:
    """The passes of a batch: predictions for guidance and direction, and the one that is trained."""
    tangents, rows = sizes
    of_v, both = ("v", "uv") if config.direction == "v_head" else ("", "")
    return {
        "guidance": Pass(rows, weights="average" if config.guidance_weights == "ema" else "online", head=of_v),
        "primal": Pass(batch, tangents, trained=True, head=both),
    }


def planned_terms(
    config: ObjectiveConfig, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan
) -> MeanFlowTerms:
    """The loss of a batch whose noise, times, dropped labels and guidance are given."""
    r, t, drop, inputs = drawn
    inputs = None if config.guidance_input == "none" else inputs
    if plan.order is not None:
        x, e, r, t, y, drop = (a[plan.order] for a in (x, e, r, t, y, drop))
        inputs = None if inputs is None else inputs.take(plan.order)
    # in this order the first samples have r = t and get no derivative
    equal, derived = slice(0, plan.tangent_start), slice(plan.tangent_start, None)
    t_ = column(t, x)
    z = (1 - t_) * x + t_ * e
    v_t = e - x

    # the network's own predictions, of samples whose derivative or target needs them before the pass
    predictions = Predictions.make(config, passes, z, t, y, inputs, plan)
    v_g_derived = predictions.guided(v_t, derived)
    direction = predictions.conditional(derived) if config.predicts_direction else v_g_derived

    # derivative (Eq. 8) and target (Eq. 18), which is v_g where r = t
    rates = (torch.full_like(t[derived], rate) if rate else None for rate in config.tangent)
    told = (torch.where(drop, passes.null_label, y), *told_to(config, inputs))
    *outputs, du_dt = passes("primal", z, r, t, *told, tangents=(direction, *rates))
    u, v = (*outputs, None)[:2]
    du_dt, predicted = du_dt.detach(), outputs[-1].detach()
    # the primal pass of a sample with r = t is its conditional prediction
    v_g = torch.cat([predictions.guided(v_t, equal, predicted[equal]), v_g_derived])

    gap = (t - r).clamp(0, 1) if config.clip_gap else t - r
    u_tgt = torch.cat([v_g[equal], v_g_derived - column(gap[derived], x) * du_dt])

    # loss: squared error (Eq. 17) with adaptive weight (Eq. 22)
    raw, weight = weighted(config, u - u_tgt)
    loss, raw_v, weight_v = raw / weight, None, None
    if v is not None:
        raw_v, weight_v = weighted(config, v - v_g)
        loss = loss + raw_v / weight_v
    return MeanFlowTerms(
        loss=loss.mean(),
        raw=raw.detach(),
        weight=weight,
        raw_v=None if raw_v is None else raw_v.detach(),
        weight_v=weight_v,
        v_loss=(predicted - v_t).square().flatten(1).sum(1),
        equal=r == t,
        u=u.detach(),
        v=None if v is None else v.detach(),
        du_dt=du_dt,
        direction=direction,
        u_tgt=u_tgt,
        v_g=v_g,
    )


def weighted(config: ObjectiveConfig, error: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error S, summed over a sample (B,), and what it is divided by, sg((S + c)^p)."""
    raw = error.square().flatten(1).sum(1)
    return raw, (raw.detach() + config.norm_c) ** config.norm_p


def meanflow_terms(
    config: ObjectiveConfig,
    net: nn.Module,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    drop: Tensor,
    plan: Plan | None = None,
    inputs: GuidanceInputs | None = None,
    *,
    guide: nn.Module | None = None,
    jvp: Jvp = pair_jvp,
) -> MeanFlowTerms:
    """The loss of a batch without a trainer.

    Args:
        net: u(z, r, t, y, *inputs) with an attribute num_classes, the null class; where config.direction is v_head, a
            network with an argument head, as :class:`meanflow.model.transformer.Transformer`.
        x, e: data and noise. r, t: times. y: labels, int64. drop: (B,) bool, who trains on the null class.
        plan: which samples need which pass (`MeanFlow.plan`); None is the official step, each on every sample. The
            numbers are the same.
        inputs: what the network is told of its guidance, where config.guidance_input says that it is told.
        guide: the average of the weights, where config.guidance_weights takes it; None is net itself.
        jvp: computes outputs and derivative, `pair_jvp` or `func_jvp`.
    """
    inputs = None if config.guidance_input == "none" else inputs
    plan = whole_batch(config, r, t, drop, inputs) if plan is None else plan
    passes = Passes(meanflow_passes(config, len(t), plan.sizes), net, net if guide is None else guide, jvp=jvp)
    return planned_terms(config, passes, x, e, y, Drawn(r, t, drop, inputs), plan)


class MeanFlow(PlannedMeanFlow):
    """MeanFlow and improved MeanFlow as the trainer's objective."""

    @property
    def watched(self) -> dict[str, str]:
        """Raw losses and v_loss (the weighted loss is about 1 whatever happens)."""
        of_v = {"raw_v": "raw loss of v"} if self._v_head else {}
        return {"raw": "raw loss", "v_loss": "v_loss"} | of_v

    @property
    def _v_head(self) -> bool:
        return self.config.direction == "v_head"

    def passes(self, sizes: Sizes) -> dict[str, Pass]:
        """See `meanflow_passes`."""
        return meanflow_passes(self.config, self.batch, sizes)

    def terms(self, passes: Passes, x: Tensor, e: Tensor, y: Tensor, drawn: Drawn, plan: Plan) -> MeanFlowTerms:
        """See `planned_terms`."""
        return planned_terms(self.config, passes, x, e, y, drawn, plan)

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Sums over all samples, over those with r = t, and over the others."""
        return (*SUMS, *V_SUMS) if self._v_head else SUMS

    def sums(self, terms: MeanFlowTerms) -> dict[str, Tensor]:
        """The addends of a micro-batch."""
        raw, equal, unequal = terms.raw, terms.equal, ~terms.equal
        du_dt = terms.du_dt.square().flatten(1).mean(1)  # only of the samples with a derivative
        of_v = {name: getattr(terms, name).sum().double() for name in V_SUMS if self._v_head}
        return of_v | {
            "samples": torch.full((), float(len(raw)), device=raw.device),
            "unequal_samples": unequal.sum(),
            "raw": raw.sum().double(),
            "raw_equal": torch.where(equal, raw, 0).sum().double(),
            "raw_unequal": torch.where(unequal, raw, 0).sum().double(),
            "v_loss": terms.v_loss.sum().double(),
            "weight": terms.weight.sum().double(),
            "du_dt": torch.where(unequal[len(raw) - len(du_dt) :], du_dt, 0).sum().double(),
        }

    def columns(self, sums: dict[str, float]) -> dict[str, float | None]:
        """Means over the samples, and the root mean square of the derivative where r < t."""

        def mean(name: str, count: float) -> float | None:
            return sums[name] / count if count else None

        samples, unequal = sums["samples"], sums["unequal_samples"]
        du_dt = mean("du_dt", unequal)
        return {
            "raw": mean("raw", samples),
            "raw_equal": mean("raw_equal", samples - unequal),
            "raw_unequal": mean("raw_unequal", unequal),
            **{name: mean(name, samples) for name in ("v_loss", "weight", *V_SUMS) if name in sums},
            "du_dt_rms": None if du_dt is None else du_dt**0.5,
        }
