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

V - v_g is computed as u - u_tgt: the same number and gradient. x is data, e noise, v_t its velocity, u the average
velocity that the network predicts, v its prediction of the velocity: of a head for it, or u(z, t, t). sg is
stop-gradient. Tensors are (B, channels, height, width), times and losses (B,). The benchmarks' naive_terms is
MeanFlow's without a plan.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ObjectiveConfig
from .guidance import GuidanceInputs, told_to
from .plan import Plan, whole_batch
from .terms import Terms

# (net, (z, r, t), (z_dot, r_dot, t_dot), others, tangent_start, **options) -> the network's outputs, u first, and du_dt
# others follow the times; tangents are of the samples from tangent_start on
Jvp = Callable[..., tuple[Tensor, ...]]


def pair_jvp(net, primals, tangents, others, tangent_start=0, **options):
    """Compute outputs and du/dt by the network's own tangents; autograd records nothing of the derivative."""
    if tangent_start == len(primals[0]):
        out = net(*primals, *others, **options)
        return (*out, primals[0][tangent_start:]) if isinstance(out, tuple) else (out, primals[0][tangent_start:])
    return net(*primals, *others, **options, tangents=tangents, tangent_start=tangent_start)


def func_jvp(net, primals, tangents, others, tangent_start=0, **options):
    """The same by torch.func.jvp, for any network; autograd records the derivative, and of all samples."""

    def whole(x, x_dot):
        out = torch.zeros_like(x)
        if x_dot is not None:
            out[tangent_start:] = x_dot
        return out

    tangents = tuple(whole(x, x_dot) for x, x_dot in zip(primals, tangents, strict=True))
    out, out_dot = torch.func.jvp(lambda *times: net(*times, *others, **options), primals, tangents)[:2]
    return (*out, out_dot[0][tangent_start:]) if isinstance(out, tuple) else (out, out_dot[tangent_start:])


class Predictions(NamedTuple):
    """The network's own predictions of the velocity, at r = t, for those who need them before the derivative."""

    config: ObjectiveConfig
    plan: Plan
    kappa: Tensor | float
    """Of v_g = omega v_t + kappa v_c + (1 - omega - kappa) v_null, a number or (B,)."""
    rows: Tensor
    """(G, ...), a row for each row of the plan."""

    @classmethod
    @torch.no_grad()
    def make(cls, config, net: nn.Module, z: Tensor, t: Tensor, y: Tensor, inputs: GuidanceInputs | None, plan: Plan):
        """One forward of all rows; none at all without rows."""
        kappa, told, rows, null = config.kappa, None, plan.rows, plan.null
        if inputs is not None:
            omega = guided_scale(config, t, inputs)
            kappa = 1 - 1 / omega
            # guidance acts always in a prediction, with the scale 1 where it did not
            always = torch.zeros_like(t[rows]), torch.ones_like(t[rows])
            told = GuidanceInputs(torch.where(null, 1, omega[rows]), *always)
        if not len(rows):
            return cls(config, plan, kappa, z[:0])
        t, y = t[rows], torch.where(null, net.num_classes, y[rows])
        head = {"head": "v"} if config.direction == "v_head" else {}
        return cls(config, plan, kappa, net(z[rows], t, t, y, *told_to(config, told), **head))

    def conditional(self, samples: slice, primal: Tensor | None = None) -> Tensor:
        """v_c of some samples. primal: of the same pass, where the plan takes that for a prediction."""
        cond_row = self.plan.cond_row[samples]
        v_c = self.rows[cond_row.clamp(min=0)]
        return v_c if primal is None else torch.where(_column(cond_row < 0, v_c), primal, v_c)

    def guided(self, v: Tensor, samples: slice, primal: Tensor | None = None) -> Tensor:
        """v_g of some samples, from the velocity v of all."""
        plan, v, omega = self.plan, v[samples], self.config.omega
        if not (self.config.guided and len(self.rows)):
            return v
        kappa = _column(self.kappa[samples], v) if isinstance(self.kappa, Tensor) else self.kappa
        v_g = omega * v + (1 - omega - kappa) * self.rows[plan.null_row[samples]]
        if self.config.mixes_conditional:
            v_g = v_g + kappa * self.conditional(samples, primal)
        return torch.where(_column(plan.guided[samples], v), v_g, v)


def guided_scale(config: ObjectiveConfig, t: Tensor, inputs: GuidanceInputs) -> Tensor:
    """omega' (B,): omega within the drawn interval, both ends included, else 1."""
    if config.guidance_input != "interval":
        return inputs.omega
    return torch.where((inputs.start <= t) & (t <= inputs.end), inputs.omega, 1)


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
) -> Terms:
    """The loss of a batch whose noise, times, dropped labels and guidance are given.

    Args:
        net: u(z, r, t, y, *inputs) with an attribute num_classes, the null class; where config.direction is v_head, a
            network with an argument head, as :class:`meanflow.model.imf.ImfDiT`.
        x, e: data and noise. r, t: times. y: labels, int64. drop: (B,) bool, who trains on the null class.
        plan: which samples need which pass (`Planner.plan`); None is the official step, each on every sample. The
            numbers are the same.
        inputs: what the network is told of its guidance, where config.guidance_input says that it is told.
        guide: the network that predicts velocities; None is net itself.
        jvp: computes outputs and derivative, `pair_jvp` or `func_jvp`.
    """
    inputs = None if config.guidance_input == "none" else inputs
    plan = whole_batch(config, r, t, drop, inputs) if plan is None else plan
    if plan.order is not None:
        x, e, r, t, y, drop = (a[plan.order] for a in (x, e, r, t, y, drop))
        inputs = None if inputs is None else inputs.take(plan.order)
    # in this order the first samples have r = t and get no derivative
    equal, derived = slice(0, plan.tangent_start), slice(plan.tangent_start, None)
    t_ = _column(t, x)
    z = (1 - t_) * x + t_ * e
    v_t = e - x

    # the network's own predictions, of samples whose derivative or target needs them before the pass
    predictions = Predictions.make(config, net if guide is None else guide, z, t, y, inputs, plan)
    v_g_derived = predictions.guided(v_t, derived)
    direction = predictions.conditional(derived) if config.predicts_direction else v_g_derived

    # derivative (Eq. 8) and target (Eq. 18), which is v_g where r = t
    rates = (torch.full_like(t[derived], rate) if rate else None for rate in config.tangent)
    others = (torch.where(drop, net.num_classes, y), *told_to(config, inputs))
    heads = {"head": "uv"} if config.direction == "v_head" else {}
    *outputs, du_dt = jvp(net, (z, r, t), (direction, *rates), others, plan.tangent_start, **heads)
    u, v = (*outputs, None)[:2]
    du_dt, predicted = du_dt.detach(), outputs[-1].detach()
    # the primal pass of a sample with r = t is its conditional prediction
    v_g = torch.cat([predictions.guided(v_t, equal, predicted[equal]), v_g_derived])

    gap = (t - r).clamp(0, 1) if config.clip_gap else t - r
    u_tgt = torch.cat([v_g[equal], v_g_derived - _column(gap[derived], x) * du_dt])

    # loss: squared error (Eq. 17) with adaptive weight (Eq. 22)
    raw, weight = weighted(config, u - u_tgt)
    loss, raw_v, weight_v = raw / weight, None, None
    if v is not None:
        raw_v, weight_v = weighted(config, v - v_g)
        loss = loss + raw_v / weight_v
    return Terms(
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


class MeanFlowLoss(nn.Module):
    """:func:`meanflow_terms` as one module, so that all passes of a step are one call to compile, or to wrap in DDP.

    Args:
        net: the network in training.
        guide: the network that predicts velocities, for weights other than net's; it is not trained.
    """

    def __init__(self, config: ObjectiveConfig, net: nn.Module, guide: nn.Module | None = None):
        super().__init__()
        self.config, self.net = config, net
        # a tuple keeps it out of the module's parameters
        self._guide = (guide,)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        drop: Tensor,
        plan: Plan | None = None,
        inputs: GuidanceInputs | None = None,
    ) -> Terms:
        """Call :func:`meanflow_terms` with these arguments."""
        return meanflow_terms(self.config, self.net, x, e, r, t, y, drop, plan, inputs, guide=self._guide[0])


def _column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return a.reshape(-1, *[1] * (like.ndim - 1))
