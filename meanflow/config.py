"""The configuration of a run: frozen dataclasses that check their values."""

import itertools
from dataclasses import dataclass
from typing import Literal

from .errors import require, require_finite
from .objective_options import ObjectiveOptions
from .sizes import DIT_PATCHES, DIT_SIZES, IMF_HEAD_DEPTH, IMF_SIZES

GuidanceInput = Literal["none", "omega", "interval"]


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
    time_embedding: Literal["t,h", "t,r", "t,r,h", "h", "t"] = "t,h"
    """Which times are embedded, h = t - r (paper, Table 1c); t alone for a function of one time."""
    time_scale: float = 1.0
    """What the times are multiplied by before they are embedded: 1 (MeanFlow), or 1000 (DiT)."""
    log_variance: bool = False
    """Whether the network learns the log-variance of its error at each time too (sCM)."""
    network: Literal["dit", "imf"] = "dit"
    """DiT, or the transformer of improved MeanFlow, which can be told its guidance."""
    head_depth: int = 0
    """imf: how many of the blocks are u's own; as many more are those of a head for v. 0: no head for v."""

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
        most, times = (self.depth, self.time_embedding) if self.network == "imf" else (0, "h")
        wanted = f"a whole number from 0 to {most}" if most else "0: a DiT has no head for v"
        require(0 <= self.head_depth <= most, "model.head_depth", self.head_depth, wanted, "change it")
        even = self.network == "dit" or width // heads % 2 == 0
        require(even, "model.num_heads", heads, f"heads of an even part of the width {width} for imf", hint)
        require(times == "h", "model.time_embedding", times, "h for an imf network", "it sees t by the noise in z")
        fits = self.time_scale > 0 and (self.network == "dit" or (self.time_scale, self.log_variance) == (1, False))
        require(fits, "model.time_scale", self.time_scale, "a positive number, for imf 1 and no log_variance", hint)

    @property
    def name(self) -> str:
        """Official size and patch, for instance "XL/2" or "imf-B/2"; of other networks depth, width and patch."""
        shape, sizes = (self.depth, self.hidden_size, self.num_heads), IMF_SIZES if self.network == "imf" else DIT_SIZES
        size = next((size for size, known in sizes.items() if known == shape), f"{self.depth}x{self.hidden_size}")
        return f"{'imf-' * (self.network == 'imf')}{size}/{self.patch_size}"

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
            options = dict(network="imf", head_depth=IMF_HEAD_DEPTH, mlp_ratio=8 / 3, time_embedding="h")
            return cls(*improved[name], **options | overrides)
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

    def check(self, run: "RunConfig") -> None:
        direction, told, heads = self.direction, self.guidance_input, run.model.head_depth
        wanted, hint = "none for a DiT, which cannot be told", "take model.network imf"
        require(told == "none" or run.model.network == "imf", "objective.guidance_input", told, wanted, hint)
        wanted = f"1 or more with objective.direction v_head, else 0, not with {direction}"
        require((direction == "v_head") == (heads > 0), "model.head_depth", heads, wanted, "change one of them")
        groups = run.train.groups or 1
        if self.equal_placement == "first" and run.train.batch % groups == 0:
            batch, share = run.train.batch // groups, self.share_equal
            within = f" in {groups} groups" if groups > 1 else ""
            wanted = f"one that a share of r = t of {share:g} divides to within 5 %{within}"
            nearest = groups * next(b for b in itertools.count(batch) if _divides(b, share))
            hint = f"take {nearest} samples, or objective.equal_placement bernoulli"
            require(_divides(batch, share), "train.batch", run.train.batch, wanted, hint)

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


@dataclass(frozen=True)
class OptimConfig:
    """Adam and the moving average of the weights."""

    lr: float = 1e-4
    """Learning rate, constant after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    warmup_from_zero: bool = False
    """Whether the first step of a warm-up has the rate 0 (improved MeanFlow), or the rate of one step."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    ema_decay: float = 0.9999
    """Decay of the moving average, which starts as a copy of the weights at step 0."""
    implementation: Literal["native", "torch", "apex"] = "native"
    """The step in one pass over memory with the average (csrc), torch's fused AdamW, or NVIDIA apex's FusedAdam."""

    def __post_init__(self):
        require_finite(self, "optim")
        require(self.lr > 0, "optim.lr", self.lr, "a positive number", "change it")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name}", value, "a number in [0, 1)", "change it")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name}", value, "zero or more", "change it")
        require(self.eps > 0, "optim.eps", self.eps, "a positive number", "change it")


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    name: Literal["digits", "fashion", "latents"] = "latents"
    """scikit-learn's handwritten digits, Fashion-MNIST, or a folder of cached VAE latents."""
    path: str = ""
    """Folder of the latents, as scripts/prepare_data.py writes it; or of Fashion-MNIST's four idx files, by default
    where Debian's package dataset-fashion-mnist has them."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The autoencoder that made the latents; it decodes samples."""
    scale: float = 0.18215
    """Factor on the latents (official: no shift)."""
    latent_mean: tuple[float, ...] = ()
    """Mean of each channel, subtracted from the latents before all else (improved MeanFlow). Empty: nothing is."""
    latent_std: tuple[float, ...] = ()
    """Standard deviation of each channel, which they are divided by then, beside the scale. Empty: nothing is."""
    sample_posterior: bool = True
    """Draw the latent anew from the posterior at each step (official), or take its mean."""
    drop_last: bool = True
    """Leave out the samples of an epoch that do not fill a batch (official); otherwise they open the next epoch's."""
    flip: bool = False
    """Mirror half of the samples: the encodings of mirrored images where the folder has them, else the latents.
    The official code sets its flag and never uses it; other code bases flip."""
    pixels: Literal["symmetric", "unit"] = "symmetric"
    """Range of the images behind the latents: [-1, 1], or [0, 1] as EDM2's are; decoded samples become [-1, 1]."""

    def __post_init__(self):
        require_finite(self, "data")
        require(self.scale > 0, "data.scale", self.scale, "a positive number", "change it")
        mean, std = self.latent_mean, self.latent_std
        fits = len(mean) == len(std) and all(each > 0 for each in std)
        require(fits, "data.latent_std", std, f"{len(mean)} positive numbers, as data.latent_mean", "give both or none")

    @property
    def in_pixels(self) -> bool:
        """Whether the images themselves are trained on: no autoencoder decodes them, a small classifier judges them."""
        return self.name != "latents"


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, hardware and output of a training run."""

    steps: int
    """Optimizer steps of the whole run."""
    batch: int = 256
    """Samples a step."""
    seed: int = 0
    """Seed of the initial weights, the data's order and all draws."""
    init: str = ""
    """Weights to begin with, to fine-tune: a run folder, a checkpoint, or a file of scripts/export.py or convert.py."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of matrix products and attention. Weights, residual stream, target and loss stay in fp32."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """Rounding of the inputs of fp32 matrix products: none, TF32, bf16 (torch.set_float32_matmul_precision)."""
    compile: bool = False
    """Compile the whole step, once: minutes for a large network, of which a repeated run takes most from a cache."""
    checkpoint_blocks: bool = False
    """Compute each block again in backward instead of keeping what it saves: less memory, a third more work."""
    cuda_graph: bool = False
    """Replay the whole step, optimizer included, as a CUDA graph, which removes the host's launch overhead; that of
    several processes too (ddp, zero1). Shards (fsdp, hybrid) run uncaptured."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms: a resumed run is bit-exact on CUDA too (on the CPU it always is)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    log_every: int = 100
    """Steps between two log lines."""
    sample_every: int = 10_000
    """Steps between two grids of one-step samples."""
    save_every: int = 5_000
    """Steps between two checkpoints."""
    keep_last: int = 3
    """Number of latest checkpoints to keep."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this number; 0: none beyond keep_last."""
    accumulate: int = 1
    """Micro-batches into which each process splits its share of the batch: less memory, the same step."""
    parallel: Literal["ddp", "zero1", "fsdp", "hybrid"] = "ddp"
    """Several processes (torchrun): a copy of all in each (ddp), or of what the network reads, with fp32 weights,
    average and optimizer state sharded (zero1); parameters, gradients and optimizer state sharded over all (fsdp), or
    over the processes of a machine and copied between machines (hybrid)."""
    shard_size: int = 0
    """hybrid: number of processes that share one copy; 0: those of one machine."""
    groups: int = 0
    """Number of equal groups of the batch. In each, the first samples get r = t and dropped labels (officially one
    group per device). 0: one per process when the run starts, then fixed."""
    wandb: str = ""
    """Project of Weights & Biases to log to, beside TensorBoard; needs the package wandb."""

    def __post_init__(self):
        for name in ("steps", "batch", "log_every", "sample_every", "save_every", "keep_last", "accumulate"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name}", value, "a positive whole number", "change it")
        for name in ("keep_every", "shard_size", "groups"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "zero or more", "change it")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "a number in [0, 2^63)", "change it")


@dataclass(frozen=True)
class GuardConfig:
    """Steps to skip: those whose loss or gradient is not finite, or far above its running mean."""

    spike: float = 10.0
    """Factor over its running mean at which a raw loss, v_loss or gradient norm counts as a spike; 0: no spikes."""
    patience: int = 10
    """Number of skipped steps in a row after which `then` applies; checked at each log line."""
    then: Literal["stop", "rollback"] = "stop"
    """After patience: stop, or go back to the last checkpoint and on with new data and draws."""
    rollbacks: int = 3
    """How often a run may go back."""

    def __post_init__(self):
        require_finite(self, "guard")
        require(self.spike == 0 or self.spike > 1, "guard.spike", self.spike, "a factor above 1, or 0", "change it")
        require(self.patience >= 1, "guard.patience", self.patience, "a positive whole number", "change it")
        require(self.rollbacks >= 0, "guard.rollbacks", self.rollbacks, "zero or more", "change it")


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the average's one-step samples while it trains. scripts/evaluate.py has more of them, afterwards."""

    every: int = 0
    """Steps between two evaluations; 0 makes none. Digits and Fashion-MNIST are judged by a classifier,
    latents by the FID."""
    count: int = 10_000
    """Samples; the official 50,000 take long, and fewer give a higher FID."""
    inception: str = ""
    """The FID network's weight file, pt_inception-2015-12-05-6726825d.pth."""
    reference: str = ""
    """Reference statistics: ADM's VIRTUAL_imagenet256_labeled.npz, or the cache's reference.npz."""
    guidance: tuple[float, ...] = ()
    """What a network that is told of its guidance is told for samples, those of the log too: omega, and where guidance
    begins and ends. None: the official best of its size."""

    def __post_init__(self):
        require_finite(self, "evaluation")
        require(self.every >= 0, "evaluation.every", self.every, "zero or more", "change it")
        require(self.count >= 2, "evaluation.count", self.count, "at least 2", "change it")


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run."""

    model: ModelConfig
    objective: ObjectiveOptions
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        known, wanted = len(self.data.latent_mean), f"a number for each of {self.model.in_channels} channels, or none"
        require(known in (0, self.model.in_channels), "data.latent_mean", self.data.latent_mean, wanted, "give both")
        learned, fits = self.model.log_variance, self.model.log_variance == self.objective.log_variance
        require(fits, "model.log_variance", learned, f"{not learned} with this objective", "change one of them")
        self.objective.check(self)


def _divides(batch: int, share: float) -> bool:
    """Whether int(batch share) samples are about that share, and rounding leaves neither r = t nor r < t empty."""
    equal = int(batch * share)
    return abs(equal / batch - share) <= 0.05 and (equal > 0) == (share > 0) and (equal < batch) == (share < 1)
