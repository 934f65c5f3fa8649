"""Checkpoints: one safetensors file a step, whole or absent, checked when read."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError

FORMAT = "meanflow-checkpoint-1"
_PATTERN = "step_*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A step's tensors by name, and the run's configuration as a dict."""

    step: int
    config: dict
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, "model" or "ema" for instance."""
        return {key.removeprefix(f"{name}."): x for key, x in self.tensors.items() if key.startswith(f"{name}.")}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob(_PATTERN))


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write a checkpoint atomically, then drop all but the last keep_last.

    Raises:
        UserError: where the folder cannot be written; what it held is untouched.
    """
    path = folder / f"step_{checkpoint.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    tensors = {name: x.detach().cpu().contiguous() for name, x in checkpoint.tensors.items()}
    metadata = {
        "format": FORMAT,
        "step": str(checkpoint.step),
        "config": json.dumps(checkpoint.config),
        "checksum": _checksum(tensors),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.partial"):  # of a run that was killed while writing
            stale.unlink()
        save_file(tensors, partial, metadata)
        _flush(partial)
        os.replace(partial, path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(x.nbytes for x in tensors.values()) / 2**20
        raise UserError(
            f"checkpoint: got {path}, which cannot be written ({error}), wanted {size:.0f} MiB free in a writable "
            "folder; make room or name another by --out, and repeat the command"
        ) from None
    for old in checkpoints(folder)[:-keep_last]:
        old.unlink()
    return path


def load(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        UserError: where it is missing, damaged or not one of this project's.
    """
    hint = "remove it to fall back to the one before, or name another"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint: got {path}, which cannot be read ({error}), wanted a whole checkpoint; {hint}"
        ) from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"checkpoint: got {path}, a foreign safetensors file, wanted one written by this project; {hint}"
        )
    if metadata["checksum"] != _checksum(tensors):
        raise UserError(
            f"checkpoint: got {path}, whose contents do not match their checksum, wanted an intact one; {hint}"
        )
    return Checkpoint(int(metadata["step"]), json.loads(metadata["config"]), tensors)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
