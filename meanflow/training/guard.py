"""Steps that would do harm are not made: loss or gradient not finite, or far above what they were.

The guard watches the raw loss, v_loss and the gradient's norm, means over all processes (the weighted loss is about 1
whatever happens). It decides on the device, where the optimizer leaves the step out; the host looks now and then.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GuardConfig

DECAY = 0.99
WARMUP_STEPS = 200
"""Good steps before anything counts as a jump: from its start a network's losses and gradients change by themselves."""
WATCHED = ("raw loss", "v_loss", "gradient norm")


class Findings(NamedTuple):
    """What the guard found so far, on the host."""

    skipped: int
    """Steps not made, of the whole run."""
    in_a_row: int
    """Of these, the last ones without a good step between."""
    first: int
    """The first step of that row, or -1."""
    values: tuple[float, ...]
    """What the last step that was not made had: WATCHED."""
    means: tuple[float, ...]
    """The running means, of the good steps."""
    rollbacks: int
    """Times the run went back."""

    def reason(self) -> str:
        """What was wrong with the last one."""
        for name, value, mean in zip(WATCHED, self.values, self.means, strict=True):
            if value != value or value in (float("inf"), float("-inf")):
                return f"{name} not finite"
        name, value, mean = max(
            zip(WATCHED, self.values, self.means, strict=True), key=lambda x: x[1] / max(x[2], 1e-30)
        )
        return f"{name} {value:.4g}, {value / max(mean, 1e-30):.1f} times its running mean"


class SpikeGuard:
    """Watches a run's steps.

    Args:
        config: what counts as a jump. device: that of the step.
    """

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._state = {name: zero.clone() for name in ("good", "skipped", "in_a_row", "rollbacks")}
        self._state["first"] = zero - 1
        self._state |= {name: zero.expand(len(WATCHED)).clone() for name in ("means", "values")}

    @torch.no_grad()
    def check(self, raw: Tensor, v_loss: Tensor, grad_norm: Tensor, step: Tensor) -> Tensor:
        """Look at a step before it is made; 1 (a scalar fp32 tensor) where it must not be, else 0. The host waits not.

        Args:
            raw, v_loss, grad_norm: () means over the global batch, and the norm of its gradient. step: () its index.
        """
        s = self._state
        values = torch.stack([raw, v_loss, grad_norm]).double()
        bad = ~torch.isfinite(values).all()
        if self.config.spike:
            bad = bad | ((s["good"] >= WARMUP_STEPS) & (values > self.config.spike * s["means"]).any())
        # in place, for a captured graph finds them where they were
        s["good"].add_(~bad)
        weight = torch.clamp(1 / s["good"].clamp(min=1), min=1 - DECAY)
        s["means"].copy_(torch.where(bad, s["means"], s["means"] + weight * (values - s["means"])))
        s["values"].copy_(torch.where(bad, values, s["values"]))
        s["first"].copy_(torch.where(bad, torch.where(s["in_a_row"] > 0, s["first"], step.double()), -1.0))
        s["skipped"].add_(bad)
        s["in_a_row"].copy_(torch.where(bad, s["in_a_row"] + 1, 0.0))
        return bad.float()

    def findings(self) -> Findings:
        """What it found; waits for the device."""
        s = {name: x.tolist() for name, x in self._state.items()}
        counts = {name: int(s[name]) for name in ("skipped", "in_a_row", "first", "rollbacks")}
        return Findings(**counts, values=tuple(s["values"]), means=tuple(s["means"]))

    def went_back(self, found: Findings) -> None:
        """The run went back to a checkpoint, whose state this has again: what was found since stays counted."""
        self._state["skipped"].fill_(found.skipped)
        self._state["rollbacks"].fill_(found.rollbacks + 1)
        self._state["in_a_row"].zero_()
        self._state["first"].fill_(-1)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for the checkpoint; loading fills them in place."""
        return self._state
