"""The paper's recipes and ablations (arXiv 2505.13447, Tables 1, 4 and 5), and the digits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from .errors import nearest, require

IMAGENET_TRAIN_IMAGES = 1_281_167
BATCH = 256


@dataclass(frozen=True)
class Preset:
    """A recipe and what the paper reports for it."""

    config: Callable[[], RunConfig]
    summary: str
    fid: float | None = None
    """FID of 50,000 one-step samples, ImageNet 256x256."""


def _imagenet(model: str, epochs: int, *, time_embedding: str = "t,h", **objective) -> RunConfig:
    return RunConfig(
        model=ModelConfig.official(model, time_embedding=time_embedding),
        objective=ObjectiveConfig(**objective),
        optim=OptimConfig(),
        data=DataConfig(name="latents"),
        train=TrainConfig(
            steps=epochs * (IMAGENET_TRAIN_IMAGES // BATCH),
            batch=BATCH,
            # the official program leaves fp32 products to the accelerator's default, one bf16 pass
            matmul="medium",
            compile=True,
        ),
    )


def _digits() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            depth=4, hidden_size=96, num_heads=4, patch_size=2, input_size=8, in_channels=1, num_classes=10
        ),
        objective=ObjectiveConfig(share_equal=0.5, label_drop=0.0),
        optim=OptimConfig(lr=4e-3, warmup_steps=100, ema_decay=0.99),
        data=DataConfig(name="digits"),
        train=TrainConfig(steps=1800, batch=64, log_every=25, sample_every=300, save_every=300),
    )


def _digits_flow_matching() -> RunConfig:
    config = _digits()
    return replace(config, objective=replace(config.objective, share_equal=1.0))


def _recipes() -> dict[str, Preset]:
    """Table 4: the six columns."""
    columns = {  # name: (model, epochs, omega, kappa, guidance interval, FID)
        "b4": ("B/4", 80, 1.0, 0.0, (0.0, 1.0), 61.06),
        "b2": ("B/2", 240, 1.0, 0.5, (0.0, 1.0), 6.17),
        "m2": ("M/2", 240, 1.0, 0.5, (0.0, 1.0), 5.01),
        "l2": ("L/2", 240, 0.2, 0.92, (0.0, 0.8), 3.84),
        "xl2": ("XL/2", 240, 0.2, 0.92, (0.0, 0.75), 3.43),
        "xl2-plus": ("XL/2", 1000, 1.0, 0.5, (0.3, 0.8), None),
    }
    return {
        f"imagenet-{name}": Preset(
            lambda model=model, epochs=epochs, omega=omega, kappa=kappa, interval=interval: _imagenet(
                model, epochs, omega=omega, kappa=kappa, guidance_start=interval[0], guidance_end=interval[1]
            ),
            f"Table 4, {model}, {epochs} epochs, omega {omega:g}, kappa {kappa:g}, "
            f"t in [{interval[0]:g}, {interval[1]:g}]",
            fid,
        )
        for name, (model, epochs, omega, kappa, interval, fid) in columns.items()
    }


# the ablations of Tables 1 and 5 (B/4, 80 epochs): {table: {row: (overrides of the objective or embedding, FID)}}
ABLATIONS: dict[str, dict[str, tuple[dict, float]]] = {
    "table1a": {  # share of samples with r != t, in per cent
        "0": ({"share_equal": 1.0}, 328.91),
        "25": ({"share_equal": 0.75}, 61.06),
        "50": ({"share_equal": 0.5}, 63.14),
        "100": ({"share_equal": 0.0}, 67.32),
    },
    "table1b": {  # direction (v, r_dot, t_dot) of the derivative
        "v01": ({"tangent": (0.0, 1.0)}, 61.06),
        "v00": ({"tangent": (0.0, 0.0)}, 268.06),
        "v10": ({"tangent": (1.0, 0.0)}, 329.22),
        "v11": ({"tangent": (1.0, 1.0)}, 137.96),
    },
    "table1c": {  # embedded times
        "t-r": ({"time_embedding": "t,r"}, 61.75),
        "t-h": ({"time_embedding": "t,h"}, 61.06),
        "t-r-h": ({"time_embedding": "t,r,h"}, 63.98),
        "h": ({"time_embedding": "h"}, 63.13),
    },
    "table1d": {  # distribution of the times
        "uniform": ({"time_distribution": "uniform"}, 65.90),
        "ln-0.2-1": ({"time_mean": -0.2, "time_std": 1.0}, 63.83),
        "ln-0.2-1.2": ({"time_mean": -0.2, "time_std": 1.2}, 64.72),
        "ln-0.4-1": ({"time_mean": -0.4, "time_std": 1.0}, 61.06),
        "ln-0.4-1.2": ({"time_mean": -0.4, "time_std": 1.2}, 61.79),
    },
    "table1e": {  # power of the adaptive weight
        "p0": ({"norm_p": 0.0}, 79.75),
        "p0.5": ({"norm_p": 0.5}, 63.98),
        "p1": ({"norm_p": 1.0}, 61.06),
        "p1.5": ({"norm_p": 1.5}, 66.57),
        "p2": ({"norm_p": 2.0}, 69.19),
    },
    "table1f": {  # guidance scale
        "omega1": ({"omega": 1.0}, 61.06),
        "omega1.5": ({"omega": 1.5}, 33.33),
        "omega2": ({"omega": 2.0}, 20.15),
        "omega3": ({"omega": 3.0}, 15.53),
        "omega5": ({"omega": 5.0}, 20.75),
    },
    "table5": {  # mixing kappa at the effective scale omega / (1 - kappa) = 2
        "kappa0": ({"omega": 2.0, "kappa": 0.0}, 20.15),
        "kappa0.5": ({"omega": 1.0, "kappa": 0.5}, 19.15),
        "kappa0.8": ({"omega": 0.4, "kappa": 0.8}, 19.10),
        "kappa0.9": ({"omega": 0.2, "kappa": 0.9}, 18.63),
        "kappa0.95": ({"omega": 0.1, "kappa": 0.95}, 19.17),
    },
}


def _ablations() -> dict[str, Preset]:
    return {
        f"{table}-{row}": Preset(
            lambda overrides=overrides: _imagenet("B/4", 80, **overrides),
            f"{table.capitalize()}, B/4, 80 epochs, " + ", ".join(f"{k} {v}" for k, v in overrides.items()),
            fid,
        )
        for table, rows in ABLATIONS.items()
        for row, (overrides, fid) in rows.items()
    }


PRESETS: dict[str, Preset] = {
    "digits": Preset(_digits, "scikit-learn's handwritten digits, minutes on a CPU"),
    "digits-flow-matching": Preset(_digits_flow_matching, "the same with r = t always"),
    **_recipes(),
    **_ablations(),
}


def preset(name: str) -> RunConfig:
    """The whole configuration of a preset."""
    wanted = f"a preset, of which {nearest(name, PRESETS)} are nearest"
    require(name in PRESETS, "preset", name, wanted, "scripts/train.py alone lists them all")
    return PRESETS[name].config()
