"""Options of objectives that learn to jump along a flow: SoFlow (arXiv 2512.15657), shortcut models (arXiv 2410.12557),
both without a derivative, and alpha-Flow (arXiv 2510.20771)."""

from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar, Literal

from ..errors import require, require_finite
from ..objective_options import ObjectiveOptions
from ..recipe import ObjectiveConfig

TWO_TIMES = ("t,h", "t,r", "t,r,h", "h")
"""What tells a network of both its times."""


@dataclass(frozen=True)
class SoFlowConfig(ObjectiveOptions, kind="soflow"):
    """SoFlow's training target. Defaults are the official code's; each of its peculiarities is an option."""

    renoises: ClassVar[bool] = True
    time_embeddings: ClassVar[tuple[str, ...]] = TWO_TIMES

    velocity_share: float = 0.75
    """Share of samples that learn the velocity, the first int(batch share) of a device's batch."""
    velocity_time: tuple[float, float] = (-0.2, 1.0)
    """Mean and standard deviation of the logit of a velocity sample's time."""
    start_time: tuple[float, float] = (0.2, 0.8)
    """The same of a consistency sample's t."""
    end_time: tuple[float, float] = (-1.0, 0.8)
    """The same of its s."""
    least_gap: float = 1e-4
    """Least t, t - s and t - l of a consistency sample."""
    ratio_schedule: Literal["exponent", "linear", "cosine", "const"] = "exponent"
    """How (t - l) / (t - s) goes from its first value to its last one over the run; const: it is the last always."""
    ratio_first: float = 0.1
    """See ratio_schedule."""
    ratio_last: float = 0.002
    """See ratio_schedule."""
    norm_p: float = 1.0
    """Power p of the adaptive weight 1 / (raw + c)^p."""
    norm_c: float = 0.01
    """Its constant c. raw is a mean over a sample's elements, not a sum as MeanFlow's."""
    omega: float = 3.0
    """Scale of guidance. At 1 or less, guidance, mixing and officially the dropping of labels are switched off."""
    guidance_end: float = 0.8
    """Guidance decays smoothly from this time on, to none at t = 1."""
    guidance_decay: float = 0.025
    """Its rate: kappa(t) = 1 - exp(-rate q / (1 - q)), where q is the share of the time that remains."""
    mix: float = 0.25
    """Share m of the guided velocity in the mixed one; the network's own prediction has the rest."""
    label_drop: float = 0.1
    """Probability of training a sample on the null class, and on the plain velocity."""
    drop_unguided: bool = False
    """Whether labels are dropped without guidance too."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("velocity_share", "guidance_end", "mix", "label_drop"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name}", value, "a number in [0, 1]", "change it")
        for name in ("velocity_time", "start_time", "end_time"):
            value = getattr(self, name)
            fits = len(value) == 2 and value[1] > 0
            require(fits, f"objective.{name}", value, "a mean and a positive standard deviation", "change it")
        for name in ("ratio_first", "ratio_last"):
            value = getattr(self, name)
            require(0 < value <= 1, f"objective.{name}", value, "a number in (0, 1]", "change it")
        gap, wanted = self.least_gap, "a number in (0, 1)"
        require(0 < gap < 1, "objective.least_gap", gap, wanted, "officially 1e-4: a consistency sample divides by it")
        require(self.norm_c > 0, "objective.norm_c", self.norm_c, "a positive number", "change it")
        require(self.norm_p >= 0, "objective.norm_p", self.norm_p, "zero or more", "0 is the plain squared error")
        decay = self.guidance_decay
        require(decay > 0, "objective.guidance_decay", decay, "a positive number", "officially 0.025")

    @property
    def guided(self) -> bool:
        """Whether samples with a label are guided."""
        return self.omega > 1

    @property
    def mixes(self) -> bool:
        """Whether the mixed velocity takes the network's own prediction."""
        return self.guided and self.mix < 1

    @property
    def dropped(self) -> float:
        """Probability of dropping a label."""
        return self.label_drop if self.guided or self.drop_unguided else 0.0


@dataclass(frozen=True)
class ShortcutConfig(ObjectiveOptions, kind="shortcut"):
    """Shortcut models' training target. Defaults are the official code's; each of its peculiarities is an option."""

    time_embeddings: ClassVar[tuple[str, ...]] = ("tau,level", *TWO_TIMES)

    timesteps: int = 128
    """Steps of the finest level, a power of two; their times are on its grid."""
    bootstrap_every: int = 8
    """One of so many samples is a bootstrap sample, the first ones of a device's batch."""
    level_bias: bool = False
    """Whether half of the bootstrap samples learn the two coarsest levels."""
    reuse_images: bool = True
    """Whether velocity samples take the batch's images from its first one on, as bootstrap samples do (official), and
    its last images are left out; or those behind the bootstrap samples'."""
    bootstrap_weights: Literal["average", "online"] = "average"
    """Weights that make the half steps."""
    guide: bool = True
    """Whether bootstrap samples of the finest level, whose half steps are velocities, are guided; so coarser levels
    learn it. (ImageNet's recipe; the official flag is off by default.)"""
    omega: float = 1.5
    """Scale of guidance u_null + omega (u_cond - u_null) in the half steps; 0 trains on the null class alone."""
    label_drop: float = 0.1
    """Probability of training a velocity sample on the null class; a bootstrap sample keeps its label."""
    clip: float = 4.0
    """Bound of a bootstrap sample's half way point and of its target."""
    path_eps: float = 1e-5
    """Share of noise that is left at t = 0."""

    def __post_init__(self):
        require_finite(self, "objective")
        steps = self.timesteps
        fits = steps >= 2 and steps & (steps - 1) == 0
        require(fits, "objective.timesteps", steps, "a power of two from 2 on", "officially 128")
        every = self.bootstrap_every
        require(every >= 2, "objective.bootstrap_every", every, "a whole number from 2 on", "officially 8")
        require(self.omega >= 0, "objective.omega", self.omega, "zero or more", "1 is no guidance")
        drop, eps = self.label_drop, self.path_eps
        require(0 <= drop <= 1, "objective.label_drop", drop, "a number in [0, 1]", "change it")
        require(0 <= eps < 1, "objective.path_eps", eps, "a number in [0, 1)", "officially 1e-5")
        require(self.clip > 0, "objective.clip", self.clip, "a positive number", "officially 4")

    def check(self, run: Any) -> None:
        """See the base."""
        batch, groups = run.train.batch, run.train.groups or 1
        wanted, hint = f"one bootstrap sample or more in each of {groups} groups", "take more samples, or fewer groups"
        require(batch // groups >= self.bootstrap_every, "train.batch", batch, wanted, hint)

    @property
    def finest_level(self) -> int:
        """Level of the velocity."""
        return int(log2(self.timesteps))

    @property
    def dropped(self) -> float:
        """Probability of dropping a velocity sample's label."""
        return self.label_drop if self.omega > 0 else 1.0


@dataclass(frozen=True)
class AlphaFlowConfig(ObjectiveOptions, kind="alpha-flow"):
    """Options of alpha-Flow. Defaults are the paper's for XL/2, without guidance."""

    time_embeddings: ClassVar[tuple[str, ...]] = TWO_TIMES

    anneal_start: float = 0.5
    """Share of the run's steps after which alpha begins to fall from 1, trajectory flow matching, along a sigmoid."""
    anneal_end: float = 5 / 6
    """Share after which it has come to 0, MeanFlow. It is near to its ends, and set to them, for the first and the last
    29 % of the steps between."""
    share_equal: float = 0.5
    """Share of samples with r = t, the first int(batch share) of a device's batch."""
    time_mean: float = -0.4
    """Mean of the logit of the two times that are drawn and sorted."""
    time_std: float = 1.0
    """Its standard deviation."""
    clip: float = 4.0
    """Bound of the target where alpha > 0 and r < t."""
    norm_c: float = 1e-3
    """Constant c of the adaptive weight 1 / (raw + c); raw is a mean over a sample's elements, not a sum."""
    omega: float = 1.0
    """Guidance: weight of the sample's own velocity."""
    kappa: float = 0.0
    """Guidance: weight of the class-conditional prediction. The effective scale is omega / (1 - kappa)."""
    guidance_start: float = 0.0
    """Guidance acts, and labels are dropped, where guidance_start < t < guidance_end."""
    guidance_end: float = 1.0
    """See guidance_start."""
    label_drop: float = 0.1
    """Probability of dropping a label there. Without it both predictions are those of the null class."""

    def __post_init__(self):
        require_finite(self, "objective")
        start, end = self.anneal_start, self.anneal_end
        wanted = "a number in [0, 1]"
        require(0 <= start <= 1, "objective.anneal_start", start, wanted, "0 anneals from the first step on")
        wanted = f"a number from anneal_start = {start:g} to 1"
        require(start <= end <= 1, "objective.anneal_end", end, wanted, "equal ones switch at that step")
        require(self.clip > 0, "objective.clip", self.clip, "a positive number", "officially 4")
        # refuses what is out of range of the rest
        self.meanflow()

    def meanflow(self) -> ObjectiveConfig:
        """MeanFlow's options of the same times and guidance."""
        names = ("share_equal", "time_mean", "time_std", "norm_c", "omega", "kappa", "guidance_start", "guidance_end")
        return ObjectiveConfig(**{name: getattr(self, name) for name in names}, label_drop=self.label_drop)

    def check(self, run: Any) -> None:
        """See the base."""
        self.meanflow().check(run)
