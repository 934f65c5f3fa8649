"""Records beside results: the versions, commit and hardware that made them; and atomic writes."""

import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "diffusers", "safetensors")


def environment() -> dict:
    """Versions, commit and hardware."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions, "commit": commit(), "gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()}


def commit() -> str | None:
    """The commit of the source tree, with "-dirty" if it is modified; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Write a text so that the file holds the whole new one or the old one, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
