"""Convert weights of any known format to a pipeline, to a file to start from, and to formats of other projects.

run       a run folder, a checkpoint or exported weights of this project
pipeline  a folder of MeanFlowPipeline
official  a checkpoint of the official JAX code (flax), of MeanFlow's or improved MeanFlow's
imf       a .pth file of improved MeanFlow's official PyTorch code
sit, dit, zhuyu    .pt or .safetensors files, in whatever wrapped them: see :mod:`meanflow.interop.sit`
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config_json import from_dict, to_dict
from ..errors import UserError, require
from ..model.build import check_whole
from ..objective_options import KINDS, ObjectiveOptions
from ..presets import IMPROVED, preset
from ..recipe import GuidanceInput, ModelConfig
from ..storage.checkpoint import save_weights
from ..storage.flax_files import read_flax, write_flax
from ..storage.foreign import full, read_network
from . import imf_weights
from .formats import find_format, load_run, require_plain_dit
from .formats import read_names as read_class_names
from .official_weights import from_official, to_official
from .sit import FAMILIES, from_dit, from_sit, from_zhuyu, infer_model, to_zhuyu

SCALES = {"zhuyu": 0.18125}
"""Factors on the latents that are not Stable Diffusion's 0.18215."""
RECIPES = {"dit": "imagenet-b4", "imf": "imf-b2"}
"""The paper's recipe of each network, for what is not known of its weights."""
NET = "net/"
NO_V_HEAD = "It holds no head for v, which begins as a copy of u's."
PLACES = ("checkpoint", "reference_source")
"""Fields of a report that name files of the machine; a model card leaves them out."""


@dataclass(frozen=True)
class Weights:
    """A network's weights and what is known of them."""

    tensors: dict[str, Tensor]
    """State dict of :class:`meanflow.model.dit.DiT` or :class:`meanflow.model.imf.ImfDiT`, with its heads."""
    model: ModelConfig
    config: dict
    """The run's configuration by sections, or model and data alone if nothing else is known."""
    step: int
    origin: str
    """Where the weights are from, in words."""
    which: str
    """"ema" or "model"."""
    note: str = ""
    """A note on the conversion, for the user."""


def load(
    path: Path, format: str, weights: str = "ema", *, num_heads: int | None = None, input_size: int | None = None
) -> Weights:
    """Load weights of any format, in fp32 or more.

    Args:
        format: one of the above; "auto" detects it. weights: "ema" or "model", if the source has both.
        num_heads, input_size: of the network, if the source does not tell.

    Raises:
        UserError: if it cannot be read or is something else, or not a whole network.
    """
    found = _load(path, find_format(path) if format == "auto" else format, weights, num_heads, input_size)
    check_whole(found.tensors, found.model)
    return found


def _load(path: Path, format: str, weights: str, num_heads: int | None, input_size: int | None) -> Weights:
    if format == "run":
        tensors, config, _, step = load_run(path, weights)
        return Weights(tensors, from_dict(config).model, config, step, "a run of this project", weights)
    if format == "pipeline":
        return _from_pipeline(path)
    if format == "official":
        arrays, step, found = read_flax(path, weights)
        if imf_weights.is_improved(arrays):
            return _improved(arrays, input_size, format, step, f"improved MeanFlow's official {found.name}", weights)
        try:
            tensors = {name: full(x) for name, x in from_official(arrays).items()}
        except ValueError as error:
            raise UserError(str(error)) from None
        found_all = len(tensors) == len(arrays)
        require(found_all, "checkpoint", f"{len(arrays)} arrays of {len(tensors)} names", "one network", "name another")
        model = infer_model(tensors, num_heads=num_heads, input_size=input_size)
        return _foreign(tensors, model, format, step, f"the official code's {found.name}", weights)
    known = (*FAMILIES, "imf")
    require(format in known, "format", format, f"one of {', '.join(known)} for a .pt file", "name it by --format")
    state, step, found = read_network(path, weights)
    if format == "imf":
        arrays = imf_weights.flax_arrays(state)
        return _improved(arrays, input_size, format, step, f"improved MeanFlow's official {path.name}", found)
    note, weights = "" if found == weights else f"It holds no {weights!r}: these are its {found!r}. ", found
    if format == "sit":
        tensors, model = from_sit(state, num_heads)
        note += "u(z, r, t) is SiT's velocity for every r: a start, not yet a one-step model."
    elif format == "dit":
        tensors, model, error = from_dit(state, num_heads)
        note += (
            "DiT is a diffusion model, this is no flow-matching model: a start alone. Its time embedding is fitted to "
            f"a relative error of {error:.1%}."
        )
    else:
        tensors, model = from_zhuyu(state, num_heads)
    return _foreign(tensors, model, format, step, f"{format}'s {path.name}", weights, note)


def _improved(
    arrays: Mapping[str, np.ndarray], input_size: int | None, format: str, step: int, origin: str, weights: str
) -> Weights:
    """Convert official parameters of improved MeanFlow."""
    model = imf_weights.infer_improved(arrays, input_size=input_size)
    tensors, note = {name: full(x) for name, x in imf_weights.from_official(arrays).items()}, ""
    if not any(name.startswith("v_heads.") for name in tensors):
        tensors, note = imf_weights.with_v_head(tensors, model), NO_V_HEAD
    return _foreign(tensors, model, format, step, origin, weights, note)


def _foreign(tensors, model: ModelConfig, format: str, step: int, origin: str, weights: str, note: str = "") -> Weights:
    config = _config(model)
    if model.network == "dit":
        data = preset(RECIPES["dit"]).data
        config["data"] = asdict(replace(data, scale=SCALES.get(format, data.scale)))
    return Weights(tensors, model, config, step, origin, weights, note)


def _config(model: ModelConfig, guidance_input: GuidanceInput = "interval") -> dict:
    """What a network alone tells of its run, by sections; guidance_input: what it is told."""
    if not model.beyond_dit:
        return {"model": asdict(model)}
    data = preset(RECIPES[model.network]).data
    # the latents' statistics are of so many channels
    known = model.in_channels == len(data.latent_mean)
    data = data if known else replace(data, latent_mean=(), latent_std=())
    direction = "v_head" if model.head_depth else "boundary"
    objective = replace(IMPROVED, guidance_input=guidance_input, direction=direction)
    return {"model": asdict(model), "objective": asdict(objective), "data": asdict(data)}


def load_pipeline(path: Path, **options):
    """Load a saved MeanFlowPipeline; options are from_pretrained's.

    Raises:
        UserError: for a folder that holds none, or a damaged one.
    """
    from .pipeline import MeanFlowPipeline

    try:
        return MeanFlowPipeline.from_pretrained(path, low_cpu_mem_usage=False, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"source: got {path}, which cannot be loaded ({str(error).splitlines()[0]}), wanted a folder of "
            "MeanFlowPipeline.save_pretrained; name another"
        ) from None


def _from_pipeline(path: Path) -> Weights:
    pipeline = load_pipeline(path, vae=None)
    net, recipe = pipeline.transformer, pipeline.config.recipe or {}
    model = net.model_config
    config = recipe.get("config") or _config(model, net.guidance_input)
    config = config | ({"classes": pipeline.config.id2label} if pipeline.config.id2label else {})
    weights, origin = recipe.get("weights", "ema"), recipe.get("origin", "a pipeline")
    tensors, note = {name: full(x) for name, x in net.state_dict().items()}, ""
    if model.head_depth:
        tensors, note = imf_weights.with_v_head(tensors, model), NO_V_HEAD
    return Weights(tensors, model, config, recipe.get("step", 0), origin, weights, note)


def run_config(weights: Weights) -> dict:
    """A whole run's configuration: the weights' own, with the paper's recipe for what is not known."""
    known = weights.config
    recipe = preset(RECIPES[weights.model.network])
    return known if "train" in known else to_dict(recipe) | known | {"model": asdict(weights.model)}


def save_start(weights: Weights, out: Path) -> None:
    """Write one safetensors file, to start a run from, to sample from and to evaluate."""
    save_weights(out, weights.tensors, run_config(weights), weights.step)


def _options_of(weights: Weights) -> type[ObjectiveOptions]:
    """The class of the options of their objective; MeanFlow's where nothing else is known."""
    return KINDS[weights.config.get("objective", {}).get("kind", "")]


def _require_meanflow(weights: Weights) -> None:
    kind = _options_of(weights).kind
    hint = "take weights, which are trained on, sampled and evaluated here"
    require(kind == "", "objective", kind, "MeanFlow's for this format", hint)


def save_official(weights: Weights, out: Path) -> None:
    """Write a checkpoint (msgpack) of the official code, whose params and ema_params are these weights.

    Raises:
        UserError: for networks and objectives that the official code does not have.
    """
    _require_meanflow(weights)
    if weights.model.network == "imf":
        arrays = imf_weights.to_official(_with_both_heads(weights), weights.model.mlp_hidden)
    else:
        require_plain_dit(weights.model)
        arrays = to_official(weights.tensors)
    arrays = {NET + key: x for key, x in arrays.items()}
    write_flax(out, arrays, arrays, weights.step)


def save_zhuyu(weights: Weights, out: Path) -> None:
    """Write a .pt file of zhuyu-cs's code, whose model and ema are these weights.

    Raises:
        UserError: for networks and objectives that it does not have, or where it cannot be written.
    """
    _require_meanflow(weights)
    require_plain_dit(weights.model)
    state = to_zhuyu(weights.tensors, weights.model)
    _save_torch({"model": state, "ema": state, "steps": weights.step}, out)


def save_imf(weights: Weights, out: Path) -> None:
    """Write a .pth file of improved MeanFlow's official PyTorch code, which samples: without the blocks of v's head.

    Raises:
        UserError: for networks and objectives that it does not have, or where it cannot be written.
    """
    _require_meanflow(weights)
    state = imf_weights.to_official_torch(_with_both_heads(weights), weights.model.mlp_hidden)
    _save_torch({name: x for name, x in state.items() if ".v_heads." not in name}, out)


def _with_both_heads(weights: Weights) -> dict[str, Tensor]:
    """The tensors of a network that improved MeanFlow's official code knows."""
    model, wanted = weights.model, "an imf network with heads for u and v, which this format is of"
    require(not model.beyond_imf and model.head_depth > 0, "model", model.name, wanted, "name another by --to")
    return weights.tensors


def _save_torch(state: dict, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"out: got {out}, which cannot be written ({error}), wanted room; name another") from None


def make_pipeline(
    weights: Weights, vae: str = "", names: Mapping[int, str] | None = None, scores: list[dict] | None = None
):
    """Make a :class:`meanflow.interop.pipeline.MeanFlowPipeline` of the weights, on the CPU.

    Args:
        vae: folder of the autoencoder, whose scale and statistics become those of the latents; without one the pipeline
            gives latents.
        names: of the classes (default: those that the run knows from its data).
        scores: what was measured, for the model card.

    Raises:
        UserError: where the autoencoder cannot be loaded or has other latents, and for objectives whose networks the
            pipeline's scheduler cannot sample.
    """
    options, wanted = _options_of(weights), "one whose steps lead from z_t to z_r, as the scheduler's do"
    hint = "scripts/sample.py and evaluate.py sample it, export.py has its weights"
    require(not (options.renoises or options.pushes), "objective", options.kind, wanted, hint)
    from ..data.vae import load_vae
    from .pipeline import MeanFlowPipeline
    from .scheduler import MeanFlowScheduler
    from .transformer import make_transformer

    net = make_transformer(weights.model, weights.config.get("objective", {}).get("guidance_input", "none"))
    # without a head for v, which sampling does not need
    net.load_state_dict({name: weights.tensors[name] for name in net.state_dict()})
    data = weights.config.get("data", {})
    autoencoder = None
    if vae:
        autoencoder = load_vae(vae, torch.device("cpu"), "vae")
        channels, wanted = autoencoder.config.latent_channels, f"{net.in_channels} channels of latents, as the model's"
        require(
            channels == net.in_channels, "vae", f"{channels} channels", wanted, "name the autoencoder it learnt from"
        )
        autoencoder.register_to_config(scaling_factor=data.get("scale", 0.18215))
        if data.get("latent_mean"):
            autoencoder.register_to_config(latents_mean=list(data["latent_mean"]), latents_std=list(data["latent_std"]))
    known = weights.config.get("classes")
    if names is None and known:
        names = {int(i): name for i, name in known.items()}
    # without the data's path, which is private, and the classes, which the pipeline has itself
    config = {key: value for key, value in weights.config.items() if key != "classes"} | {"data": data | {"path": ""}}
    recipe = {"origin": weights.origin, "step": weights.step, "weights": weights.which, "config": config}
    net, pixels = net.eval().requires_grad_(False), data.get("pixels", "symmetric")
    return MeanFlowPipeline(net, MeanFlowScheduler(), autoencoder, names, pixels, recipe, scores)


def save_pipeline(pipeline, out: Path) -> None:
    """Write a pipeline's folder, whole or not at all.

    Raises:
        UserError: where it cannot be written.
    """
    try:
        pipeline.save_pretrained(out)
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise UserError(f"out: got {out}, which cannot be written ({error}), wanted room; name another") from None


def read_names(source: str, classes: int) -> dict[int, str]:
    """Read the names of all classes: "imagenet", a JSON object {number: name}, or a text file with one name per line.

    Raises:
        UserError: where they cannot be read, or name other classes.
    """
    names = {int(i): name for i, name in read_class_names(source).items()}
    wanted = f"names of the classes 0 to {classes - 1}"
    require(set(names) <= set(range(classes)), "names", f"{len(names)} names", wanted, "correct the file")
    return names


def read_scores(path: Path) -> list[dict]:
    """Read the rows of scripts/evaluate.py's report.json, or of its --json output, for the model card.

    Raises:
        UserError: where it cannot be read.
    """
    try:
        report = json.loads(path.read_text())
        rows = report if isinstance(report, list) else report.get("results", [report])
        return [{key: _plain(value) for key, value in row.items() if key not in PLACES} for row in rows]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"scores: got {path}, which cannot be read ({error}), wanted a report.json") from None


def _plain(value: object) -> object:
    if isinstance(value, dict) and "value" in value:  # a score with its interval
        return value["value"]
    return " ".join(map(str, value)) if isinstance(value, list) else value
