"""MeanFlow's recipes and ablations (arXiv 2505.13447, Tables 1, 4 and 5), improved MeanFlow's, digits and fashion."""

import functools
from dataclasses import replace
from typing import Any

from .config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from .errors import nearest, require
from .recipe import IMF_HEAD_DEPTH, IMF_OPTIONS
from .recipes.base import LATENTS, Preset, digits, epochs, fashion, on_imagenet
from .recipes.family import FAMILY


def _imagenet(model: str, count: int, *, time_embedding: str = "t,h", **objective) -> RunConfig:
    network = ModelConfig.official(model, time_embedding=time_embedding)
    return on_imagenet(network, ObjectiveConfig(**objective), epochs(count))


FLOW_MATCHING: dict[str, Any] = {"share_equal": 1.0}
"""MeanFlow's options for r = t always."""


def _flow_matching(config: RunConfig) -> RunConfig:
    return replace(config, objective=replace(config.objective, **FLOW_MATCHING))


IMPROVED = ObjectiveConfig(share_equal=0.5, guidance_input="interval", direction="v_head")
"""The objective of improved MeanFlow (arXiv 2512.02012)."""


def _improved(size: str, count: int) -> RunConfig:
    model, batch = ModelConfig.official(f"imf-{size}/2"), 1024
    optim = OptimConfig(warmup_steps=epochs(10, batch), warmup_from_zero=True)
    return on_imagenet(model, IMPROVED, epochs(count, batch), batch, optim, LATENTS)


def _improved_recipes() -> dict[str, Preset]:
    """The four sizes; the exponent of omega's law is published for B/2 alone, and taken for all."""
    columns = {"B": 3.39, "M": 2.27, "L": 1.86, "XL": 1.72}
    return {
        f"imf-{size.lower()}2": Preset(
            lambda size=size: _improved(size, 640),
            f"improved MeanFlow, {size}/2, 640 epochs",
            fid,
        )
        for size, fid in columns.items()
    }


GUIDED = {"omega": 1.0, "kappa": 0.5}
# improved MeanFlow's ladder (B/2, 240 epochs): {rung: (changes of the model and of the objective, which all
# later rungs keep; in words; FIDs without and with guidance)}
RUNGS: dict[str, tuple[dict, dict, str, float | None, float]] = {
    "meanflow": ({}, {}, "MeanFlow", 32.69, 6.17),
    "boundary": ({}, {"direction": "boundary"}, "along u(z, t, t)", 29.42, 5.97),
    "v-head": (
        {"head_depth": IMF_HEAD_DEPTH},
        {"direction": "v_head"},
        "along the output of a head for v",
        30.76,
        5.68,
    ),
    "omega": ({"guidance_input": "omega"}, {"guidance_input": "omega"}, "told its scale of guidance", 25.15, 5.52),
    "interval": ({"guidance_input": "interval"}, {"guidance_input": "interval"}, "and its interval", 20.95, 4.57),
    "in-context": ({"conditioning": "in_context"}, {}, "conditions as tokens", None, 4.09),
}


def _rung(model: dict, objective: dict) -> RunConfig:
    return on_imagenet(ModelConfig.official("B/2", **model), ObjectiveConfig(**objective), epochs(240))


def _ladder() -> dict[str, Preset]:
    """The rungs below the top one, which is improved MeanFlow's recipe for 640 epochs.

    Of the rungs between, FIDs are published and no recipe: they are trained by MeanFlow's, v's head is as deep as the
    official one, and the times stay those of MeanFlow's network until the last rung has the official one.
    """
    found, model, objective = {}, {}, {}
    for rung, (of_model, of_objective, words, unguided, fid) in RUNGS.items():
        model, objective = model | of_model, objective | of_objective
        name, summary = f"ladder-{rung}", f"B/2, 240 epochs, {words}"
        if "guidance_input" in objective:
            found[name] = Preset(functools.partial(_rung, model, objective), summary, fid, unguided)
        else:
            found[name] = Preset(functools.partial(_rung, model, objective), f"{summary}, without guidance", unguided)
            found[f"{name}-guided"] = Preset(functools.partial(_rung, model, objective | GUIDED), summary, fid)
    found["ladder-modern"] = Preset(lambda: _improved("B", 240), "B/2, 240 epochs, improved MeanFlow", 3.82)
    return found


def _improved_on(config: RunConfig, conditioning: str, width: int, heads: int = 4) -> RunConfig:
    shape = {"conditioning": conditioning, "hidden_size": width, "num_heads": heads, "head_depth": 1}
    # such pictures want little guidance
    objective = replace(IMPROVED, label_drop=0.1, omega_max=2.0)
    optim = replace(config.optim, lr=8e-3)
    return replace(config, model=replace(config.model, **IMF_OPTIONS | shape), objective=objective, optim=optim)


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
            lambda model=model, count=count, omega=omega, kappa=kappa, interval=interval: _imagenet(
                model, count, omega=omega, kappa=kappa, guidance_start=interval[0], guidance_end=interval[1]
            ),
            f"Table 4, {model}, {count} epochs, omega {omega:g}, kappa {kappa:g}, "
            f"t in [{interval[0]:g}, {interval[1]:g}]",
            fid,
        )
        for name, (model, count, omega, kappa, interval, fid) in columns.items()
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
    "digits": Preset(digits, "scikit-learn's handwritten digits, minutes on a CPU"),
    "digits-flow-matching": Preset(lambda: _flow_matching(digits()), "the same with r = t always"),
    # as tokens, the conditions are 20 before the patches': at these widths a forward costs about what the DiT's does
    "digits-imf": Preset(
        lambda: _improved_on(digits(), "in_context", 64),
        "digits by improved MeanFlow, told its guidance when it samples",
    ),
    "digits-imf-adaln": Preset(
        lambda: _improved_on(digits(), "adaln", 96),
        "the same with conditions that modulate, not tokens: better at this size",
    ),
    "fashion": Preset(fashion, "Fashion-MNIST, 60,000 images of 28x28"),
    "fashion-flow-matching": Preset(lambda: _flow_matching(fashion()), "the same with r = t always"),
    "fashion-imf": Preset(
        lambda: _improved_on(fashion(), "in_context", 80, 5), "fashion by improved MeanFlow, told its guidance"
    ),
    "fashion-imf-adaln": Preset(
        lambda: _improved_on(fashion(), "adaln", 96), "the same with conditions that modulate, not tokens"
    ),
    **_recipes(),
    **_improved_recipes(),
    **_ladder(),
    **_ablations(),
    **FAMILY,
}


def preset(name: str) -> RunConfig:
    """The whole configuration of a preset."""
    wanted = f"a preset, of which {nearest(name, PRESETS)} are nearest"
    require(name in PRESETS, "preset", name, wanted, "scripts/train.py alone lists them all")
    return PRESETS[name].config()
