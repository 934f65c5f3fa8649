"""Presets of the objectives beside MeanFlow: ImageNet's by their papers, those of digits and fashion by MeanFlow's.

ImageNet's are recipes for MeanFlow's DiT, which differs from their networks in details.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..config import DataConfig, ModelConfig, OptimConfig, RunConfig
from ..objective_options import ObjectiveOptions
from .base import LATENTS, Preset, digits, epochs, fashion, on_imagenet
from .consistency import IctConfig, ImmConfig, ScmConfig
from .flow import AlphaFlowConfig, ShortcutConfig, SoFlowConfig

# --- ImageNet 256x256 ---


def _shortcut(size: str) -> RunConfig:
    """Shortcut models' official recipe; its levels are dealt over a whole batch."""
    model = ModelConfig.official(size, time_embedding="tau,level")
    optim = OptimConfig(lr=1e-4, beta2=0.999, weight_decay=0.1, ema_decay=0.999)
    data = DataConfig(name="latents", flip=True)
    run = on_imagenet(model, ShortcutConfig(), 800_000, optim=optim, data=data)
    return replace(run, train=replace(run.train, groups=1, precision="bf16"))


def _soflow(size: str, count: int, **objective) -> RunConfig:
    """SoFlow's official recipe, of which B/4's alone has a published scale of guidance."""
    optim = OptimConfig(lr=1e-4, beta2=0.99, ema_decay=0.9999)
    run = on_imagenet(ModelConfig.official(size), SoFlowConfig(**objective), epochs(count), optim=optim)
    return replace(run, train=replace(run.train, matmul="high"))


HALF = replace(LATENTS, scale=0.5, vae="stabilityai/sd-vae-ft-ema")
"""Latents of standard deviation 0.5."""
IDENTITY: dict[str, Any] = {"time_embedding": "t,r", "time_scale": 1000.0}
"""What IMM's network is told of its times."""


def _imm() -> RunConfig:
    """IMM's recipe, of which neither the optimizer's betas nor the length are sure."""
    optim = OptimConfig(lr=1e-4, beta2=0.999, ema_decay=0.9999)
    return on_imagenet(ModelConfig.official("XL/2", **IDENTITY), ImmConfig(), 1_200_000, 4096, optim, HALF)


def _alpha_flow(size: str, count: int, **objective) -> RunConfig:
    """alpha-Flow's recipe, with MeanFlow's guidance."""
    model, data = ModelConfig.official(size, time_embedding="t,r"), DataConfig(name="latents", vae=HALF.vae)
    return on_imagenet(model, AlphaFlowConfig(**objective), epochs(count), data=data)


ALPHA_FLOW: dict[str, tuple[int, dict[str, Any], float]] = {  # epochs, options, FID
    "B/2": (240, {"anneal_start": 0.0, "anneal_end": 1.0, "share_equal": 0.25, "kappa": 0.5}, 5.40),
    "XL/2": (240, {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.75}, 2.95),
    "XL/2+": (1000, {"kappa": 0.5, "guidance_start": 0.3, "guidance_end": 0.8}, 2.58),
}


def _ict() -> RunConfig:
    """iCT's recipe for ImageNet 64x64, on latents of the standard deviation that it takes data to have."""
    model = ModelConfig.official("XL/2", time_embedding="t", time_scale=1000.0)
    optim = OptimConfig(lr=1e-4, beta2=0.999, ema_decay=0.99993, algorithm="radam", implementation="torch")
    return on_imagenet(model, IctConfig(), 800_000, 4096, optim, HALF)


def _on_imagenet() -> dict[str, Preset]:
    shortcut = {"B/2": 40.3, "XL/2": 10.6}
    soflow = {"B/2": 4.85, "M/2": 3.73, "L/2": 3.20, "XL/2": 2.96}
    presets = {
        f"shortcut-{_short(size)}": Preset(partial(_shortcut, size), f"shortcut model, {size}, 800,000 steps", fid)
        for size, fid in shortcut.items()
    }
    presets |= {
        "soflow-b4": Preset(partial(_soflow, "B/4", 80), "SoFlow, B/4, 80 epochs, omega 3", 11.59),
        "soflow-b4-unguided": Preset(partial(_soflow, "B/4", 80, omega=1.0), "the same without guidance", 58.56),
    }
    presets |= {
        f"soflow-{_short(size)}": Preset(
            partial(_soflow, size, 240),
            f"SoFlow, {size}, 240 epochs, omega of B/4, for theirs is unknown",
            fid,
        )
        for size, fid in soflow.items()
    }
    words = "iCT, XL/2, as its paper trains ImageNet 64x64; FID of IMM's paper, whose run is not published"
    presets["ict-xl2"] = Preset(_ict, words, 34.24)
    presets["imm-xl2"] = Preset(_imm, "IMM, XL/2, batches of 4096, one step of two calls, for its guidance", 7.77)
    for size, (count, options, fid) in ALPHA_FLOW.items():
        words = f"alpha-Flow, {size}, {count} epochs, guidance as MeanFlow's"
        words += ", and its length, for its own is unknown" if size.endswith("+") else ""
        recipe = partial(_alpha_flow, size.rstrip("+"), count, **options)
        presets[f"alpha-flow-{_short(size)}"] = Preset(recipe, words, fid)
    return {f"imagenet-{name}": each for name, each in presets.items()}


def _short(size: str) -> str:
    return size.lower().replace("/", "").replace("+", "-plus")


# --- digits and fashion, by MeanFlow's network and optimizer ---


def _on_pictures(
    base: Callable[[], RunConfig], objective: ObjectiveOptions, train: dict | None = None, **model
) -> RunConfig:
    run = base()
    return replace(
        run, objective=objective, model=replace(run.model, **model), train=replace(run.train, **(train or {}))
    )


def _of_pictures(base: Callable[[], RunConfig], data: str, sigma_data: float) -> dict[str, Preset]:
    """The six on one data set, without guidance, for runs as short as MeanFlow's there.

    sigma_data: standard deviation of its pixels.
    """
    # what a level of 1/16 knows reaches level 1 by way of the average, in some hundred steps a level: four, not seven,
    # and more samples of each in these small batches
    shortcut = ShortcutConfig(timesteps=16, bootstrap_every=4, guide=False, label_drop=0.0)
    # with iCT's 1280 levels the gradient's norm grows a hundredfold in the course of a short run
    ict = IctConfig(sigma_data=sigma_data, s1=80)
    # samples begin at a level that is drawn often enough in so short a run; the derivative's share ends at about 0.3,
    # for at 0.6 such runs come apart
    scm = ScmConfig(sigma_data=sigma_data, p_mean=0.0, p_std=1.6, sigma_max=20.0, prior_weight=False, warmup_steps=6000)
    imm = ImmConfig(sigma_data=sigma_data, label_drop=0.0, omega=1.0)
    alpha_flow = AlphaFlowConfig(label_drop=0.0)
    runs: dict[str, tuple[str, Callable[[], RunConfig]]] = {
        "soflow": ("SoFlow", partial(_on_pictures, base, SoFlowConfig(omega=1.0))),
        "shortcut": (
            "shortcut models, 4 levels, a quarter of a batch learns them",
            partial(_on_pictures, base, shortcut, {"groups": 1}, time_embedding="tau,level"),
        ),
        "ict": ("iCT, 10 to 80 levels", partial(_on_pictures, base, ict, time_embedding="t")),
        "scm": (
            "sCM, about a third of its derivative at the end",
            partial(_on_pictures, base, scm, time_embedding="t", log_variance=True),
        ),
        "imm": ("IMM", partial(_on_pictures, base, imm, **IDENTITY)),
        "alpha-flow": ("alpha-Flow", partial(_on_pictures, base, alpha_flow, time_embedding="t,r")),
    }
    return {f"{data}-{name}": Preset(run, f"{data} by {words}") for name, (words, run) in runs.items()}


FAMILY: dict[str, Preset] = {
    **_of_pictures(digits, "digits", 0.75),
    **_of_pictures(fashion, "fashion", 0.66),
    **_on_imagenet(),
}
"""By name."""
