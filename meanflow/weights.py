"""The weights of runs: of their checkpoints, and of files exported from them."""

from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint as ckpt
from .config import RunConfig, from_dict
from .dit import DiT
from .engine import build_net, fill
from .errors import UserError


def load_checkpoint(path: Path, part: str = "ema") -> tuple[dict[str, Tensor], dict, Path, int]:
    """The weights ("ema" or "model") of a checkpoint, of a run folder's last one, or of an exported file: tensors,
    configuration as a dict, where from and step.

    Raises:
        UserError: where there is none, or a damaged or foreign one.
    """
    if path.suffix == ".safetensors":
        weights, config, step = ckpt.load_weights(path)
        return weights, config, path, step
    found = ckpt.checkpoints(path / "checkpoints") or ckpt.checkpoints(path) or [path]
    path = found[-1]
    if not (path / ckpt.HEADER).exists():
        raise UserError(
            f"checkpoint: got {path}, where there is none, wanted a run folder, a checkpoint or an exported "
            ".safetensors; train first"
        )
    header = ckpt.read_header(path)
    ckpt.verify(path, header, ema_only=part == "ema")
    return ckpt.load_part(path, part), header.config, path, header.step


def load_ema(path: Path, device: torch.device) -> tuple[DiT, RunConfig, Path, int]:
    """The network with the averaged weights of :func:`load_checkpoint`, its configuration, where from and step.

    Raises:
        UserError: where there is none, or a damaged or foreign one.
    """
    weights, values, path, step = load_checkpoint(path)
    config = from_dict(values)
    net = build_net(config.model)
    fill(net, weights, path)
    return net.to(device).eval().requires_grad_(False), config, path, step
