"""The configuration of a run: frozen dataclasses that check their values."""

from dataclasses import dataclass
from typing import Literal

from .errors import require, require_finite
from .objective_options import ObjectiveOptions
from .recipe import ModelConfig
from .recipe import ObjectiveConfig as ObjectiveConfig


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
    algorithm: Literal["adamw", "radam"] = "adamw"
    """Adam, or RAdam (arXiv 1908.03265), which needs no warm-up; both with decoupled weight decay."""
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
        only = self.algorithm == "adamw" or self.implementation == "torch"
        require(only, "optim.implementation", self.implementation, "torch", f"no other has {self.algorithm}")


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
        model, objective, hint = self.model, self.objective, "change one of them"
        learned, fits = model.log_variance, model.log_variance == objective.log_variance
        require(fits, "model.log_variance", learned, f"{not learned} with this objective", hint)
        embedded, fitting = model.time_embedding, objective.time_embeddings
        wanted = f"one of {' '.join(fitting)} with this objective"
        require(embedded in fitting, "model.time_embedding", embedded, wanted, hint)
        told, embedded = objective.guidance_input, model.guidance_input
        # improved MeanFlow's own network embeds all, whatever it is told
        fits = told == embedded or (model.network == "imf" and embedded == "interval")
        wanted = "what model.guidance_input embeds"
        require(fits, "objective.guidance_input", told, wanted, f"{hint}, the network's is {embedded}")
        heads, wanted = model.head_depth, "1 or more with objective.direction v_head, else 0"
        require(objective.v_head == (heads > 0), "model.head_depth", heads, wanted, hint)
        self.objective.check(self)
