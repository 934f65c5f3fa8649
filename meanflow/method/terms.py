"""The results of an objective."""

from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
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
