"""The MeanFlow training target and loss (arXiv 2505.13447, Algorithm 1 with the guidance of section 4.2).

    r, t, e = drawn                                                          section 4.3 (times.py)
    z = (1 - t) x + t e
    v = e - x
    v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t)    Eq. 21; v where nothing guides
    u, du_dt = jvp(u, (z, r, t), (v_g, 0, 1))                                Eq. 8
    u_tgt = v_g - (t - r) du_dt                                              Eq. 18 (Eq. 11 without guidance)
    raw = |u - sg(u_tgt)|^2                                                  Eq. 17 (Eq. 9)
    loss = mean(raw / sg(raw + c)^p)                                         Eq. 22

x is data, e noise, v its velocity, u the average velocity that the network predicts, sg stop-gradient. Tensors are
(B, channels, height, width), times and losses (B,). The benchmarks' naive_terms is the same without a plan.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ObjectiveConfig
from .plan import Plan, whole_batch
from .terms import Terms

# (net, (z, r, t), (z_dot, r_dot, t_dot), y, tangent_start) -> u, du_dt; tangents are of the samples from there on
Jvp = Callable[[nn.Module, tuple, tuple, Tensor, int], tuple[Tensor, Tensor]]


def func_jvp(net, primals, tangents, y, tangent_start=0):
    """Compute u and du/dt by torch.func.jvp, for any network; autograd records the derivative, for all samples."""

    def whole(x, x_dot):
        out = torch.zeros_like(x)
        if x_dot is not None:
            out[tangent_start:] = x_dot
        return out

    tangents = tuple(whole(x, x_dot) for x, x_dot in zip(primals, tangents, strict=True))
    u, du_dt, *_ = torch.func.jvp(lambda z, r, t: net(z, r, t, y), primals, tangents)
    return u, du_dt[tangent_start:]


def pair_jvp(net, primals, tangents, y, tangent_start=0):
    """Compute u and du/dt by the network's own tangents; autograd records nothing of the derivative."""
    if tangent_start == len(y):
        return net(*primals, y), primals[0][tangent_start:]
    return net(*primals, y, tangents=tangents, tangent_start=tangent_start)


def mix(config: ObjectiveConfig, v: Tensor, u_null: Tensor, u_cond: Tensor | None) -> Tensor:
    """v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null) (Eq. 21); u_cond None is kappa 0."""
    v_g = config.omega * v + (1 - config.omega - config.kappa) * u_null
    return v_g if u_cond is None else v_g + config.kappa * u_cond


class Guidance(NamedTuple):
    """The network's own predictions at r = t, for the guided samples."""

    config: ObjectiveConfig
    plan: Plan
    predictions: Tensor
    """(G, ...), one for each of the plan's rows."""

    @classmethod
    @torch.no_grad()
    def predict(cls, config: ObjectiveConfig, net: nn.Module, z: Tensor, t: Tensor, y: Tensor, plan: Plan):
        """Run one forward pass on the plan's rows; none if it has no rows."""
        if not len(plan.rows):
            return cls(config, plan, z[:0])
        t = t[plan.rows]
        y = torch.where(plan.null, net.num_classes, y[plan.rows])
        return cls(config, plan, net(z[plan.rows], t, t, y))

    def velocity(self, v: Tensor, u: Tensor | None, samples: slice) -> Tensor:
        """The guided velocity v_g of a slice of the samples; v where they are not guided.

        u: the primal output of these samples, used as their conditional prediction where cond_row is -1. None if no
        guided sample needs it.
        """
        plan, v = self.plan, v[samples]
        if not len(plan.rows):
            return v
        cond_row, u_cond = plan.cond_row[samples], None
        if self.config.kappa:
            u_cond = self.predictions[cond_row.clamp(min=0)]
            if u is not None:
                u_cond = torch.where(_column(cond_row < 0, v), u, u_cond)
        v_g = mix(self.config, v, self.predictions[plan.null_row[samples]], u_cond)
        return torch.where(_column(plan.guided[samples], v), v_g, v)


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
    *,
    guide: nn.Module | None = None,
    jvp: Jvp = pair_jvp,
) -> Terms:
    """The loss of a batch whose noise, times and dropped labels are given.

    Args:
        net: u(z, r, t, y) with an attribute num_classes, the null class.
        x, e: data and noise. r, t: times. y: labels, int64. drop: (B,) bool, who trains on the null class.
        plan: which samples need which pass (`Planner.plan`); None is the official step, each on every sample. The
            numbers are the same.
        guide: the network that predicts guidance; None is net itself.
        jvp: computes u and its derivative, `pair_jvp` or `func_jvp`.
    """
    plan = whole_batch(config, r, t, drop) if plan is None else plan
    if plan.order is not None:
        x, e, r, t, y, drop = (a[plan.order] for a in (x, e, r, t, y, drop))
    # in this order the first samples have r = t and get no derivative
    equal, derived = slice(0, plan.tangent_start), slice(plan.tangent_start, None)
    t_ = _column(t, x)
    z = (1 - t_) * x + t_ * e
    v = e - x

    # guided velocity (Eq. 21): needed before the pass by samples with a derivative, whose direction it is; those with
    # r = t have it after the pass, which is their u(z, t, t | y)
    guidance = Guidance.predict(config, net if guide is None else guide, z, t, y, plan)
    v_g_derived = guidance.velocity(v, None, derived)

    # derivative (Eq. 8) along (v_g, 0, 1), and target (Eq. 18), which is v_g where r = t
    direction = (v_g_derived, *(torch.full_like(t[derived], rate) if rate else None for rate in config.tangent))
    u, du_dt = jvp(net, (z, r, t), direction, torch.where(drop, net.num_classes, y), plan.tangent_start)
    u_sg, du_dt = u.detach(), du_dt.detach()
    gap = (t - r).clamp(0, 1) if config.clip_gap else t - r
    v_g_equal = guidance.velocity(v, u_sg[equal], equal)
    u_tgt = torch.cat([v_g_equal, v_g_derived - _column(gap[derived], x) * du_dt])

    # loss: squared error (Eq. 17) with adaptive weight (Eq. 22)
    raw = (u - u_tgt).square().flatten(1).sum(1)
    weight = (raw.detach() + config.norm_c) ** config.norm_p
    return Terms(
        loss=(raw / weight).mean(),
        raw=raw.detach(),
        weight=weight,
        v_loss=(u_sg - v).square().flatten(1).sum(1),
        equal=r == t,
        u=u_sg,
        du_dt=du_dt,
        u_tgt=u_tgt,
        v_g=torch.cat([v_g_equal, v_g_derived]),
    )


class MeanFlowLoss(nn.Module):
    """:func:`meanflow_terms` as one module, so that all passes of a step are one call to compile, or to wrap in DDP.

    Args:
        net: the network in training.
        guide: the network that predicts guidance, for weights other than net's; it is not trained.
    """

    def __init__(self, config: ObjectiveConfig, net: nn.Module, guide: nn.Module | None = None):
        super().__init__()
        self.config, self.net = config, net
        # a tuple keeps it out of the module's parameters
        self._guide = (guide,)

    def forward(
        self, x: Tensor, e: Tensor, r: Tensor, t: Tensor, y: Tensor, drop: Tensor, plan: Plan | None = None
    ) -> Terms:
        """Call :func:`meanflow_terms` with these arguments."""
        return meanflow_terms(self.config, self.net, x, e, r, t, y, drop, plan, guide=self._guide[0])


def _column(a: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, 1)."""
    return a.reshape(-1, *[1] * (like.ndim - 1))
