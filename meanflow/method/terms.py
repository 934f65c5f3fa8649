"""The results of an objective."""

from typing import NamedTuple

from torch import Tensor


class Terms(NamedTuple):
    """Loss and figures of a step, for its gradient, the log and the tests; samples are in the plan's order."""

    loss: Tensor
    """The scalar to differentiate. With p = 1 it is about 1 whatever the network does: watch raw."""
    raw: Tensor
    """Squared error ||u - sg(u_tgt)||^2, summed over a sample (B,)."""
    weight: Tensor
    """Divisor of raw, sg((raw + c)^p) (B,)."""
    v_loss: Tensor
    """||u - v||^2 against the unguided velocity, only logged (B,)."""
    equal: Tensor
    """Whether r = t (B,) bool."""
    u: Tensor
    du_dt: Tensor
    """The derivative, of the samples from the plan's tangent_start on."""
    u_tgt: Tensor
    v_g: Tensor
    """The guided velocity, in the target and as the direction of the derivative."""
