"""Options of consistency training, in steps (iCT, arXiv 2310.14189; ECT, arXiv 2406.14548) and continuous (sCM, arXiv
2410.11081), and of inductive moment matching (IMM, arXiv 2503.07565)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import require, require_finite
from ..objective_options import Denoising, Form, ObjectiveOptions, Pushing, TimeInput


@dataclass(frozen=True)
class IctConfig(ObjectiveOptions, kind="ict"):
    """Options of consistency training. Defaults are iCT's."""

    renoises: ClassVar[bool] = True
    time_embeddings: ClassVar[tuple[str, ...]] = ("t",)

    sigma_data: float = 0.5
    """Standard deviation of the data as it is trained on."""
    sigma_min: float = 0.002
    """The lowest level."""
    sigma_max: float = 80.0
    """The highest level."""
    p_mean: float = -1.1
    """Mean of ln(sigma), of which the levels' probabilities are made."""
    p_std: float = 2.0
    """Its standard deviation."""
    pairs: Literal["grid", "ect"] = "grid"
    """Neighbours of a grid (iCT), or any t with ECT's r(t)."""
    rho: float = 7.0
    """The grid's levels are evenly spaced in their rho-th root."""
    s0: int = 10
    """The grid has so many steps at the beginning, doubled at even distances in the run."""
    s1: int = 1280
    """And at most so many."""
    ect_q: float = 2.0
    """r / t is about 1 - q^-(stage + 1)."""
    ect_stage_steps: int = 25_000
    """Training steps of one stage (on CIFAR-10 250 x 12,800 images in batches of 128)."""
    scalings: Form = "boundary"
    """c_skip and c_out are 1 and 0 at sigma_min; plain: at 0 (ECT); or as diffusers' training script has them."""
    distance: Literal["huber", "huber_mean", "l2", "l1"] = "huber"
    """d of a sample: pseudo-Huber of its norm, or the mean over its elements of their pseudo-Huber (diffusers' script),
    squares or magnitudes (the original consistency training)."""
    huber_c: float = 0.00054
    """c of the pseudo-Huber distance, times the root of a sample's elements; 0 is the norm itself (ECT)."""
    weighting: Literal["gap", "c_out", "snr", "none"] = "gap"
    """Weight of d: 1 / (sigma - sigma'), or 1 / c_out^2 (ECT on ImageNet), or sigma^-2 + sigma_data^-2, or 1 (both the
    original consistency training)."""
    target_weights: Literal["current", "ema"] = "current"
    """Weights of the target: the ones in training, or their average (the original consistency training)."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("sigma_data", "p_std", "rho"):
            value = getattr(self, name)
            require(value > 0, f"objective.{name}", value, "a positive number", "change it")
        low, high, hint = self.sigma_min, self.sigma_max, "official is 0.002 to 80"
        require(low > 0 or (low == 0 and self.pairs == "ect"), "objective.sigma_min", low, "a positive number", hint)
        require(high > low, "objective.sigma_max", high, f"more than sigma_min = {low}", hint)
        require(self.s0 >= 1, "objective.s0", self.s0, "a positive whole number", "official is 10")
        require(self.s1 >= self.s0, "objective.s1", self.s1, f"at least s0 = {self.s0}", "official is 1280")
        require(self.ect_q > 1, "objective.ect_q", self.ect_q, "a number above 1", "official is 2, or 256")
        steps = self.ect_stage_steps
        require(steps >= 1, "objective.ect_stage_steps", steps, "a positive whole number", "change it")
        require(self.huber_c >= 0, "objective.huber_c", self.huber_c, "zero or more", "official is 0.00054")

    @property
    def denoising(self) -> Denoising:
        """See the base."""
        return Denoising(self.sigma_data, self.sigma_max, self.sigma_min, self.scalings)


@dataclass(frozen=True)
class ScmConfig(ObjectiveOptions, kind="scm"):
    """Options of sCM. Defaults are FastGen's, which are the paper's for CIFAR-10 but for the loss's scale."""

    renoises: ClassVar[bool] = True
    time_embeddings: ClassVar[tuple[str, ...]] = ("t",)

    sigma_data: float = 0.5
    """Standard deviation of the data as it is trained on."""
    sigma_min: float = 0.002
    """The lowest level sigma = sigma_data tan(t)."""
    sigma_max: float = 80.0
    """The highest level."""
    p_mean: float = -1.0
    """Mean of ln(sigma)."""
    p_std: float = 1.4
    """Its standard deviation."""
    warmup_steps: int = 10_000
    """Training steps over which rho, the share of the derivative, rises from 0 to 1; 0: it is always 1."""
    norm_c: float = 0.1
    """Constant c of the tangent's normalisation."""
    norm: Literal["rms", "l2"] = "rms"
    """Norm of the tangent: root mean square (FastGen), or root of the sum of squares (paper)."""
    prior_weight: bool = True
    """Whether the loss is weighted by 1 / sigma."""
    divide_twice: bool = True
    """Whether the mean square of a sample is divided by its number of elements again (FastGen)."""
    log_variance: bool = True
    """Whether the network has a learned log-variance w (model.log_variance); else it is 0."""
    time_input: TimeInput = "log_sigma"
    """What the network is told of the time: ln(sigma) / 4 (FastGen, EDM's networks), or t itself (paper)."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("sigma_data", "sigma_min", "p_std", "norm_c"):
            value = getattr(self, name)
            require(value > 0, f"objective.{name}", value, "a positive number", "change it")
        low, high = self.sigma_min, self.sigma_max
        require(high > low, "objective.sigma_max", high, f"more than sigma_min = {low}", "official is 80")
        steps = self.warmup_steps
        require(steps >= 0, "objective.warmup_steps", steps, "zero or more", "official is 10000")

    @property
    def denoising(self) -> Denoising:
        """See the base."""
        return Denoising(self.sigma_data, self.sigma_max, time_input=self.time_input)


@dataclass(frozen=True)
class ImmConfig(ObjectiveOptions, kind="imm"):
    """Options of IMM. Defaults are the paper's for ImageNet 256x256."""

    pushes: ClassVar[bool] = True
    time_embeddings: ClassVar[tuple[str, ...]] = ("t,r", "t,h", "t,r,h")

    sigma_data: float = 0.5
    """Standard deviation of the data as it is trained on; the noise has the same."""
    set_size: int = 4
    """Samples M that share their times, and whose moments are compared; a batch is dealt in whole sets."""
    t_min: float = 0.0
    """The least time, eps (0.006 on CIFAR-10)."""
    t_max: float = 0.994
    """The largest time, T, at which sampling begins."""
    time_law: Literal["uniform", "log_normal"] = "uniform"
    """Law of t: uniform on [t_min, t_max], or ln(t / (1 - t)) normal, kept within them. s is uniform on [t_min, t]."""
    p_mean: float = -1.1
    """Mean of that logarithm."""
    p_std: float = 2.0
    """Its standard deviation."""
    gap_power: int = 12
    """k: r is below t by a 2^-k-th of the range of t / (1 - t), or s where that is above (15 on CIFAR-10)."""
    weight_a: float = 1.0
    """Power a of 1 - t in the weight: 1 was best in one step, 2 in several."""
    weight_b: float = 4.0
    """Shift b of the log signal-to-noise ratio in the weight (5 on CIFAR-10)."""
    label_drop: float = 0.1
    """Probability of training a sample on the null class; its target keeps the label."""
    omega: float = 1.5
    """Scale of guidance when it samples, by two calls of the network; 1 is none, by one. Training does not know it."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("sigma_data", "p_std"):
            value = getattr(self, name)
            require(value > 0, f"objective.{name}", value, "a positive number", "change it")
        size, low, high = self.set_size, self.t_min, self.t_max
        require(size >= 1, "objective.set_size", size, "a positive whole number", "officially 4")
        require(0 <= low < 1, "objective.t_min", low, "a number in [0, 1)", "officially 0")
        require(low < high < 1, "objective.t_max", high, f"a number between t_min = {low} and 1", "officially 0.994")
        power, a, b = self.gap_power, self.weight_a, self.weight_b
        require(0 <= power <= 40, "objective.gap_power", power, "a whole number from 0 to 40", "officially 12")
        require(a >= 0, "objective.weight_a", a, "zero or more", "officially 1 or 2")
        require(abs(b) <= 100, "objective.weight_b", b, "a number in [-100, 100]", "officially 4")
        drop = self.label_drop
        require(0 <= drop <= 1, "objective.label_drop", drop, "a number in [0, 1]", "change it")
        require(self.omega >= 0, "objective.omega", self.omega, "zero or more", "officially 1.5")

    @property
    def pushing(self) -> Pushing:
        """See the base."""
        return Pushing(self.sigma_data, self.t_min, self.t_max, self.omega)
