"""The MeanFlow training target and loss (arXiv 2505.13447, Algorithm 1 and section 4.2).

x data, e noise, z = (1 - t) x + t e, v = e - x, u(z, r, t) average velocity, sg stop-gradient. Tensors are
(B, channels, height, width), times and losses (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import ObjectiveConfig
from .draws import Draws, Stream

# (net, (z, r, t), (z_dot, r_dot, t_dot), y, start) -> u, du_dt; the directions are those of the samples from start on
Jvp = Callable[[nn.Module, tuple, tuple, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Terms:
    """What a step computes, for its gradient, the log and the tests; a row a sample."""

    loss: Tensor
    """The scalar that is differentiated. With p = 1 it is about 1 whatever the network does: watch raw."""
    raw: Tensor
    """Squared error ||u - sg(u_tgt)||^2, summed over a sample (B,)."""
    weight: Tensor
    """sg((raw + c)^p), which raw is divided by (B,)."""
    v_loss: Tensor
    """||u - v||^2 against the unguided velocity, only logged (B,)."""
    u: Tensor
    du_dt: Tensor
    """The derivative of the samples from first_unequal on."""
    u_tgt: Tensor
    v_g: Tensor
    """The guided velocity: in the target, and the direction of the derivative."""


def func_jvp(net, primals, tangents, y, start=0):
    """u and du/dt by torch.func.jvp, for any network; autograd records the derivative, and of all samples."""

    def whole(x, x_dot):
        out = torch.zeros_like(x)
        if x_dot is not None:
            out[start:] = x_dot
        return out

    tangents = tuple(whole(x, x_dot) for x, x_dot in zip(primals, tangents, strict=True))
    u, du_dt = torch.func.jvp(lambda z, r, t: net(z, r, t, y), primals, tangents)
    return u, du_dt[start:]


def pair_jvp(net, primals, tangents, y, start=0):
    """u and du/dt by the network's explicit pairs: nothing is recorded for the derivative."""
    if start == len(y):
        return net(*primals, y), primals[0][start:]
    return net(*primals, y, tangents=tangents, tangent_start=start)


def drop_mask(config: ObjectiveConfig, uniforms: Tensor) -> Tensor:
    """Which samples of a device's batch train on the null class, from one uniform number a sample (B,)."""
    drop = uniforms < config.label_drop
    if config.drop_placement == "bernoulli":
        return drop
    return torch.arange(len(drop), device=drop.device) < drop.sum()


def mix(v: Tensor, u_null: Tensor, u_cond: Tensor | None, omega: Tensor, kappa: Tensor) -> Tensor:
    """v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null) (paper, appendix B.1).

    u_cond None is kappa 0.
    """
    v_g = omega * v + (1 - omega - kappa) * u_null
    return v_g if u_cond is None else v_g + kappa * u_cond


@torch.no_grad()
def guided_velocity(config: ObjectiveConfig, net: nn.Module, z: Tensor, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """The velocity with guidance folded in: the network's own predictions at h = 0, on the true labels."""
    if not config.guided:
        return v
    inside = _column((config.guidance_start <= t) & (t <= config.guidance_end), v)
    omega = torch.where(inside, v.new_tensor(config.omega), 1.0)
    kappa = torch.where(inside, v.new_tensor(config.kappa), 0.0)
    u_null = net(z, t, t, torch.full_like(y, net.num_classes))
    u_cond = net(z, t, t, y) if config.kappa else None
    return mix(v, u_null, u_cond, omega, kappa)


def meanflow_terms(
    config: ObjectiveConfig,
    net: nn.Module,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    drop: Tensor,
    *,
    first_unequal: int = 0,
    guide: nn.Module | None = None,
    jvp: Jvp = pair_jvp,
) -> Terms:
    """The loss of a batch whose noise, times and dropped labels are given.

    Args:
        net: u(z, r, t, y) with an attribute num_classes, the null class.
        x, e: data and noise. r, t: times. y: labels, int64. drop: (B,) bool, who trains on the null class.
        first_unequal: the samples before it have r = t: their target has no derivative in it, so none is computed.
        guide: the network that predicts guidance; None is net itself.
        jvp: how the derivative is taken.
    """
    t_ = _column(t, x)
    z = (1 - t_) * x + t_ * e
    v = e - x
    v_g = guided_velocity(config, net if guide is None else guide, z, t, y, v)
    if not config.guide_dropped:
        v_g = torch.where(_column(drop, v), v, v_g)
    y_in = torch.where(drop, net.num_classes, y)

    rest = slice(first_unequal, None)
    direction = (v_g[rest], *(torch.full_like(t[rest], rate) if rate else None for rate in config.tangent))
    u, du_dt = jvp(net, (z, r, t), direction, y_in, first_unequal)
    du_dt = du_dt.detach()
    gap = (t - r).clamp(0, 1) if config.clip_gap else t - r
    # the MeanFlow identity as a target (Eq. 10)
    u_tgt = torch.cat([v_g[:first_unequal], v_g[rest] - _column(gap[rest], x) * du_dt])

    raw = (u - u_tgt).square().flatten(1).sum(1)
    weight = (raw.detach() + config.norm_c) ** config.norm_p  # appendix B.2
    return Terms(
        loss=(raw / weight).mean(),
        raw=raw,
        weight=weight,
        v_loss=(u.detach() - v).square().flatten(1).sum(1),
        u=u,
        du_dt=du_dt,
        u_tgt=u_tgt,
        v_g=v_g,
    )


def draw_noise(x: Tensor, draws: Draws) -> Tensor:
    """Standard normal noise shaped like the batch x."""
    return draws.normal(Stream.NOISE, tuple(x.shape[1:])).to(x.dtype)


def _column(a: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return a.reshape(-1, *[1] * (like.ndim - 1))
