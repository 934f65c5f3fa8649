"""The loader of weights to sample from, to evaluate, to export and to start from.

run       a run folder, a checkpoint, or weights exported from one, whatever the file is called
pipeline  a folder of MeanFlowPipeline
official  a checkpoint of the official JAX code (flax)
""        a file of tensors, whose format its owner must name: see :mod:`meanflow.interop.convert`
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..config_json import from_dict
from ..errors import require
from ..method.views import view_of
from ..model.build import Network, build_net, check_whole, fill
from .formats import find_format, load_run


def load_checkpoint(path: Path, weights: str = "ema") -> tuple[dict[str, Tensor], dict, Path, int]:
    """The weights ("ema" or "model") in a file or folder whose format :func:`find_format` recognises.

    Returns:
        Tensors, a run's configuration as a dict, where they were found (in a run folder, its last checkpoint), step.

    Raises:
        UserError: if there is nothing, or something damaged or foreign, or a file whose format must be named.
    """
    kind = find_format(path) if path.exists() else "run"
    wanted = "a run folder, a checkpoint, exported weights or a pipeline"
    hint = "convert such a file by scripts/convert.py --to weights --format sit, dit, zhuyu or imf"
    require(kind != "", "checkpoint", str(path), wanted, hint)
    if kind == "run":
        tensors, config, path, step = load_run(path, weights)
        check_whole(tensors, from_dict(config).model)
        return tensors, config, path, step
    from . import convert  # needs optional packages

    found = convert.load(path, kind, weights)
    return found.tensors, convert.run_config(found), path, found.step


def load_ema(path: Path, device: torch.device) -> tuple[Network, RunConfig, Path, int]:
    """Load averaged weights, as sampling takes them; returns the network, its configuration, where found, and its step.

    Raises:
        UserError: as :func:`load_checkpoint`.
    """
    weights, values, found, step = load_checkpoint(path)
    config = from_dict(values)
    if (path / "vae" / "config.json").exists():
        config = replace(config, data=_with_vae(config.data, path))
    net = build_net(config.model)
    fill(net, weights, found)
    return view_of(config.objective, net.to(device).eval().requires_grad_(False)), config, found, step


def _with_vae(data: DataConfig, pipeline: Path) -> DataConfig:
    """The data configuration for a pipeline's own autoencoder."""
    values, vae = json.loads((pipeline / "model_index.json").read_text()), pipeline / "vae"
    known = json.loads((vae / "config.json").read_text())
    shift, wanted = known.get("shift_factor"), "none beside a scaling_factor and statistics"
    require(shift is None, "checkpoint", f"an autoencoder with shift_factor {shift}", wanted, "call the pipeline")
    scale, pixels = known.get("scaling_factor", data.scale), values.get("pixels") or data.pixels
    mean, std = (tuple(known.get(f"latents_{name}") or ()) for name in ("mean", "std"))
    statistics = {"latent_mean": mean, "latent_std": std}
    return replace(data, name="latents", path="", vae=str(vae), scale=scale, pixels=pixels, **statistics)
