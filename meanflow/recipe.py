"""What is trained: the options of the network, with the official sizes, and of the objective."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import require, require_finite
from .objective_options import ObjectiveOptions

# depth, width, heads
DIT_SIZES = {  # METHOD: DiT, Peebles & Xie, Table 1; M is MeanFlow's own
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
DIT_PATCHES = (2, 4, 8)

IMF_SIZES = {  # improved MeanFlow's, all with two heads of IMF_HEAD_DEPTH blocks and patches of 2
    "B": (12, 768, 12),
    "M": (24, 768, 12),
    "L": (32, 1024, 16),
    "XL": (48, 1024, 16),
}
IMF_HEAD_DEPTH = 8
IMF_OPTIONS = dict(
    mlp_ratio=8 / 3, time_embedding="h", network="imf", conditioning="in_context", guidance_input="interval"
)
"""What all of them share, beside the heads."""

GuidanceInput = Literal["none", "omega", "interval"]
GUIDANCE: dict[GuidanceInput, tuple[str, ...]] = {
    "none": (), "omega": ("omega",), "interval": ("omega", "t_min", "t_max")
}  # fmt: skip
"""What a network is told of its guidance, in order: the scale, and where guidance begins and ends."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. Defaults are those shared by all official sizes of the DiT."""

    depth: int
    """Number of transformer blocks."""
    hidden_size: int
    """Model width C."""
    num_heads: int
    """Attention heads."""
    patch_size: int
    """Side of a patch in latent pixels."""
    input_size: int = 32
    """Height and width of the latents."""
    in_channels: int = 4
    """Channels of the latents."""
    num_classes: int = 1000
    """Classes, without the null class."""
    mlp_ratio: float = 4.0
    """Width of the MLP over the model width."""
    time_embedding: Literal["t,h", "t,r", "t,r,h", "h", "t", "tau,level"] = "t,h"
    """Which times are embedded, h = t - r (paper, Table 1c), t alone for a function of one time; or tau = 1 - t and
    level = -log2(h), as shortcut models do."""
    time_scale: float = 1.0
    """What the times are multiplied by before they are embedded: 1 (MeanFlow), or 1000 (DiT)."""
    log_variance: bool = False
    """Whether the network learns the log-variance of its error at each time too (sCM)."""
    network: Literal["dit", "imf"] = "dit"
    """Blocks and positions: DiT's, or those of improved MeanFlow (RMSNorm, SwiGLU, QK-norm, rotary positions)."""
    head_depth: int = 0
    """How many of the blocks are u's own; as many more are those of a head for v. 0: no head for v."""
    conditioning: Literal["adaln", "in_context"] = "adaln"
    """How class, times and guidance enter: their sum modulates each layer, or each is tokens before the patches'."""
    guidance_input: GuidanceInput = "none"
    """What the network embeds of its guidance; objective.guidance_input says what of it training tells."""

    def __post_init__(self):
        require_finite(self, "model")
        for name in ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels", "num_classes"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}", value, "a positive whole number", "change it")
        width, heads, size, patch = self.hidden_size, self.num_heads, self.input_size, self.patch_size
        hint = "change one of them"
        wanted = f"a positive number that gives {width} channels an MLP of one or more"
        require(self.mlp_hidden >= 1, "model.mlp_ratio", self.mlp_ratio, wanted, "DiT's is 4")
        require(width % heads == 0, "model.num_heads", heads, f"a divisor of the width {width}", hint)
        require(width % 4 == 0, "model.hidden_size", width, "a multiple of 4", "the sin-cos position table needs it")
        require(size % patch == 0, "model.patch_size", patch, f"a divisor of the input size {size}", hint)
        wanted = f"a whole number from 0 to the depth {self.depth}"
        require(0 <= self.head_depth <= self.depth, "model.head_depth", self.head_depth, wanted, "change it")
        even = self.network == "dit" or width // heads % 2 == 0
        require(even, "model.num_heads", heads, f"heads of an even part of the width {width} for imf", hint)
        fits = self.time_scale > 0 and (self.network == "dit" or (self.time_scale, self.log_variance) == (1, False))
        require(fits, "model.time_scale", self.time_scale, "a positive number, for imf 1 and no log_variance", hint)

    @property
    def name(self) -> str:
        """Official size and patch, for instance "XL/2" or "imf-B/2"; of other networks depth, width and patch. What
        differs from the official network follows.
        """
        shape, sizes = (self.depth, self.hidden_size, self.num_heads), IMF_SIZES if self.network == "imf" else DIT_SIZES
        size = next((size for size, known in sizes.items() if known == shape), f"{self.depth}x{self.hidden_size}")
        usual = {"dit": "adaln", "imf": "in_context"}[self.network]
        other = f"-{self.conditioning}" * (self.conditioning != usual)
        return f"{'imf-' * (self.network == 'imf')}{size}/{self.patch_size}{other}"

    @property
    def options(self) -> dict[str, Any]:
        """What the network's class takes, by name."""
        values = asdict(self)
        network, ratio, conditioning = (values.pop(name) for name in ("network", "mlp_ratio", "conditioning"))
        values |= {"time_embedding": self.time_embedding.split(","), "in_context": conditioning == "in_context"}
        if network == "imf":
            del values["time_scale"], values["log_variance"]
            return values | {"mlp_hidden": self.mlp_hidden, "v_head": self.head_depth > 0}
        return values | {"mlp_ratio": ratio}

    @property
    def beyond_dit(self) -> dict[str, object]:
        """The options that make it another network than MeanFlow's DiT, of any size: none for that one."""
        plain = {"network": "dit", "conditioning": "adaln", "guidance_input": "none", "head_depth": 0}
        return self._beyond(plain | {"time_scale": 1.0, "log_variance": False})

    @property
    def beyond_imf(self) -> dict[str, object]:
        """The same of improved MeanFlow's own network, with a head for v or without."""
        return self._beyond({name: value for name, value in IMF_OPTIONS.items() if name != "mlp_ratio"})

    def _beyond(self, options: dict[str, object]) -> dict[str, object]:
        return {name: getattr(self, name) for name, value in options.items() if getattr(self, name) != value}

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Tokens L of a sample."""
        return (self.input_size // self.patch_size) ** 2

    @classmethod
    def official(cls, name: str, **overrides) -> "ModelConfig":
        """One of the official sizes by its name, for instance "XL/2" or "imf-B/2"."""
        known = {f"{s}/{p}": (*shape, p) for s, shape in DIT_SIZES.items() for p in DIT_PATCHES}
        improved = {f"imf-{s}/2": (*shape, 2) for s, shape in IMF_SIZES.items()}
        wanted = "one of " + " ".join(known | improved)
        require(name in known | improved, "model", name, wanted, "name a size and a patch")
        if name in improved:
            return cls(*improved[name], **IMF_OPTIONS | {"head_depth": IMF_HEAD_DEPTH} | overrides)
        return cls(*known[name], **overrides)


@dataclass(frozen=True)
class ObjectiveConfig(ObjectiveOptions):
    """MeanFlow's training target. Defaults are the official code's; each of its peculiarities is an option."""

    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the two times that are drawn and sorted (paper, Table 1d)."""
    time_mean: float = -0.4
    """Mean of the logit."""
    time_std: float = 1.0
    """Standard deviation of the logit."""
    share_equal: float = 0.75
    """Share of samples with r = t; the paper's Table 1a counts the others. 1 is flow matching."""
    equal_placement: Literal["first", "bernoulli"] = "first"
    """Which samples get r = t: the first int(batch * share) of a device's batch (official), or each by a coin."""
    equal_time: Literal["max", "single"] = "max"
    """Time of samples with r = t: the larger of the two draws (official), or the first draw."""
    tangent: tuple[float, float] = (0.0, 1.0)
    """(r_dot, t_dot) of the derivative's direction (v, r_dot, t_dot); (0, 1) is right, others are Table 1b."""
    clip_gap: bool = True
    """Clip t - r to [0, 1] in the target (official); it matters only for r > t."""
    norm_p: float = 1.0
    """Power p of the adaptive weight 1 / (loss + c)^p (paper, Table 1e)."""
    norm_c: float = 0.01
    """Constant c of the adaptive weight (0.01 in the official code; the paper's text says about 1e-3)."""
    omega: float = 1.0
    """Guidance: weight of the sample's own velocity."""
    kappa: float = 0.0
    """Guidance: weight of the class-conditional prediction. The effective scale is omega / (1 - kappa)."""
    guidance_start: float = 0.0
    """Guidance acts where guidance_start <= t <= guidance_end; elsewhere omega is 1 and kappa 0."""
    guidance_end: float = 1.0
    """See guidance_start; both ends count."""
    guidance_input: GuidanceInput = "none"
    """What the network is told of its guidance, so that it is chosen when sampling: nothing; a scale omega, drawn for
    each sample, with v_g = v + (1 - 1 / omega) (v_c - v_null); or that and an interval (improved MeanFlow)."""
    omega_max: float = 8.0
    """Drawn scales lie in [1, omega_max]."""
    omega_power: float = 1.0
    """Their density falls with omega^-omega_power."""
    direction: Literal["guided", "boundary", "v_head"] = "guided"
    """z's direction of the derivative: v_g (MeanFlow), or the prediction u(z, t, t | y), or that of a head for v, which
    is trained beside u (both improved MeanFlow)."""
    guidance_weights: Literal["current", "ema"] = "current"
    """Weights that predict the guidance: the ones in training (official) or their EMA."""
    label_drop: float = 0.1
    """Probability of training a sample on the null class."""
    drop_placement: Literal["first", "bernoulli"] = "first"
    """Which labels are dropped: the first n of a device's batch, n binomial (official), or each by a coin."""
    guide_dropped: bool = False
    """Whether samples without a label are guided too; officially they take the plain velocity."""

    def __post_init__(self):
        require_finite(self, "objective")
        for name in ("share_equal", "label_drop", "guidance_start", "guidance_end"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name}", value, "a number in [0, 1]", "change it")
        start, wanted = self.guidance_start, f"at most objective.guidance_end = {self.guidance_end}"
        require(start <= self.guidance_end, "objective.guidance_start", start, wanted, "order the interval")
        require(self.time_std > 0, "objective.time_std", self.time_std, "a positive number", "change it")
        require(self.norm_c > 0, "objective.norm_c", self.norm_c, "a positive number", "change it")
        require(self.norm_p >= 0, "objective.norm_p", self.norm_p, "zero or more", "0 is the plain squared error")
        hint = "0 leaves the conditional prediction out"
        require(0 <= self.kappa < 1, "objective.kappa", self.kappa, "a number in [0, 1)", hint)
        require(self.omega >= 0, "objective.omega", self.omega, "zero or more", "1 with kappa 0 is no guidance")
        fixed = (self.omega, self.kappa) == (1, 0) and (self.guidance_start, self.guidance_end) == (0, 1)
        require(
            self.guidance_input == "none" or fixed, "objective.guidance_input", self.guidance_input,
            "none where omega, kappa or the interval are fixed", "leave them at 1, 0 and [0, 1]: they are inputs",
        )  # fmt: skip
        require(self.omega_max > 1, "objective.omega_max", self.omega_max, "a number above 1", "official is 8")

    def check(self, run: Any) -> None:
        """Raise UserError where the options do not fit the batch of a run's configuration."""
        groups = run.train.groups or 1
        if self.equal_placement == "first" and run.train.batch % groups == 0:
            batch, share = run.train.batch // groups, self.share_equal
            within = f" in {groups} groups" if groups > 1 else ""
            wanted = f"one that a share of r = t of {share:g} divides to within 5 %{within}"
            nearest = groups * next(b for b in itertools.count(batch) if _divides(b, share))
            hint = f"take {nearest} samples, or objective.equal_placement bernoulli"
            require(_divides(batch, share), "train.batch", run.train.batch, wanted, hint)

    @property
    def v_head(self) -> bool:
        """See the base."""
        return self.direction == "v_head"

    @property
    def guided(self) -> bool:
        """Whether any sample is guided at all."""
        return self.omega != 1 or self.mixes_conditional

    @property
    def mixes_conditional(self) -> bool:
        """Whether guidance takes the network's conditional prediction."""
        return self.kappa != 0 or self.guidance_input != "none"

    @property
    def predicts_direction(self) -> bool:
        """Whether the derivative's direction is the network's conditional prediction."""
        return self.direction != "guided"


def _divides(batch: int, share: float) -> bool:
    """Whether int(batch share) samples are about that share, and rounding leaves neither r = t nor r < t empty."""
    equal = int(batch * share)
    return abs(equal / batch - share) <= 0.05 and (equal > 0) == (share > 0) and (equal < batch) == (share < 1)
