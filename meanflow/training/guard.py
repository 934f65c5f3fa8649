"""Skips steps that would do harm: loss or gradient not finite, or far above their running means.

The guard watches what the objective says, its raw losses, and the gradient's norm, means over all processes. It decides
on the device, where the optimizer skips the step; the host looks now and then.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GuardConfig

DECAY = 0.99
WARMUP_STEPS = 200
"""Good steps before anything counts as a spike: at its start a network's losses and gradients change by themselves."""


class Findings(NamedTuple):
    """Counts and values of the guard so far, on the host."""

    skipped: int
    """Skipped steps of the whole run."""
    in_a_row: int
    """Skipped steps since the last good one."""
    first: int
    """The first of these steps, or -1."""
    values: tuple[float, ...]
    """Values of the last skipped step: the losses, the gradient's norm."""
    means: tuple[float, ...]
    """Running means over the good steps, in the same order."""
    rollbacks: int
    """How often the run went back."""
    words: tuple[str, ...]
    """What the losses are called."""

    def reason(self) -> str:
        """Why the last step was skipped."""
        names = (*self.words, "gradient norm")
        for name, value, mean in zip(names, self.values, self.means, strict=True):
            if value != value or value in (float("inf"), float("-inf")):
                return f"{name} not finite"
        name, value, mean = max(zip(names, self.values, self.means, strict=True), key=lambda x: x[1] / max(x[2], 1e-30))
        return f"{name} {value:.4g}, {value / max(mean, 1e-30):.1f} times its running mean"


class SpikeGuard:
    """Decides which steps to skip.

    Args:
        config: what counts as a spike. device: of the step.
        watched: names of the terms to watch (`Objective.watched`), in words.
    """

    def __init__(self, config: GuardConfig, device: torch.device, watched: dict[str, str]):
        self.config = config
        self.losses, self._words = tuple(watched), tuple(watched.values())
        """Names of the terms to watch."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._state = {name: zero.clone() for name in ("good", "skipped", "in_a_row", "rollbacks")}
        self._state["first"] = zero - 1
        self._state |= {name: zero.expand(len(self.losses) + 1).clone() for name in ("means", "values")}

    @torch.no_grad()
    def check(self, losses: Tensor, grad_norm: Tensor, step: Tensor) -> Tensor:
        """1.0 if this step must be skipped, else 0.0, as a scalar tensor on the device; does not synchronise.

        Args:
            losses: means over the global batch, by self.losses. grad_norm: () norm of its gradient. step: () its index.
        """
        s = self._state
        values = torch.cat([losses, grad_norm[None]]).double()
        bad = ~torch.isfinite(values).all()
        if self.config.spike:
            bad = bad | ((s["good"] >= WARMUP_STEPS) & (values > self.config.spike * s["means"]).any())
        # in place: a captured graph reads these tensors where they are
        s["good"].add_(~bad)
        weight = torch.clamp(1 / s["good"].clamp(min=1), min=1 - DECAY)
        s["means"].copy_(torch.where(bad, s["means"], s["means"] + weight * (values - s["means"])))
        s["values"].copy_(torch.where(bad, values, s["values"]))
        s["first"].copy_(torch.where(bad, torch.where(s["in_a_row"] > 0, s["first"], step.double()), -1.0))
        s["skipped"].add_(bad)
        s["in_a_row"].copy_(torch.where(bad, s["in_a_row"] + 1, 0.0))
        return bad.float()

    def findings(self) -> Findings:
        """Counts and values so far; waits for the device."""
        s = {name: x.tolist() for name, x in self._state.items()}
        counts = {name: int(s[name]) for name in ("skipped", "in_a_row", "first", "rollbacks")}
        return Findings(**counts, values=tuple(s["values"]), means=tuple(s["means"]), words=self._words)

    def went_back(self, found: Findings) -> None:
        """Restore the counts after the run has gone back to a checkpoint, which had restored older ones."""
        self._state["skipped"].fill_(found.skipped)
        self._state["rollbacks"].fill_(found.rollbacks + 1)
        self._state["in_a_row"].zero_()
        self._state["first"].fill_(-1)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for the checkpoint; loading fills them in place."""
        return self._state
