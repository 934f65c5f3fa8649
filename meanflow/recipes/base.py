"""What presets are made of: runs on ImageNet's latents, on digits and on Fashion-MNIST."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from ..objective_options import ObjectiveOptions

IMAGENET_TRAIN_IMAGES = 1_281_167
BATCH = 256


@dataclass(frozen=True)
class Preset:
    """A recipe and what the paper reports for it."""

    config: Callable[[], RunConfig]
    summary: str
    fid: float | None = None
    """FID of 50,000 one-step samples, ImageNet 256x256."""
    fid_unguided: float | None = None
    """The same of a network that is told not to guide, where it is published too."""


def epochs(count: int, batch: int = BATCH) -> int:
    """Steps of so many epochs of ImageNet."""
    return count * (IMAGENET_TRAIN_IMAGES // batch)


def on_imagenet(
    model: ModelConfig,
    objective: ObjectiveOptions,
    steps: int,
    batch: int = BATCH,
    optim: OptimConfig = OptimConfig(),
    data: DataConfig = DataConfig(name="latents"),
) -> RunConfig:
    """A run on ImageNet's latents; by default with the optimizer and data of MeanFlow's official code."""
    return RunConfig(
        model=model,
        objective=objective,
        optim=optim,
        data=data,
        train=TrainConfig(
            steps=steps,
            batch=batch,
            # the official program leaves fp32 products to the accelerator's default, one bf16 pass
            matmul="medium",
            compile=True,
        ),
    )


def digits() -> RunConfig:
    """MeanFlow on scikit-learn's handwritten digits, minutes on a CPU."""
    return RunConfig(
        model=ModelConfig(
            depth=4, hidden_size=96, num_heads=4, patch_size=2, input_size=8, in_channels=1, num_classes=10
        ),
        objective=ObjectiveConfig(share_equal=0.5, label_drop=0.0),
        optim=OptimConfig(lr=4e-3, warmup_steps=100, ema_decay=0.99),
        data=DataConfig(name="digits"),
        train=TrainConfig(steps=1800, batch=64, log_every=25, sample_every=300, save_every=300),
    )


def fashion() -> RunConfig:
    """The same on Fashion-MNIST."""
    config = digits()
    return replace(
        config,
        model=replace(config.model, patch_size=4, input_size=32),
        data=DataConfig(name="fashion"),
        train=replace(config.train, steps=2400),
    )


LATENTS = DataConfig(
    name="latents",
    scale=1.0,
    latent_mean=(0.86488, -0.27787343, 0.21616915, 0.3738409),
    latent_std=(4.85503674, 5.31922414, 3.93725398, 3.9870003),
)
"""Improved MeanFlow's and others', whose latents have statistics instead of a scale."""
