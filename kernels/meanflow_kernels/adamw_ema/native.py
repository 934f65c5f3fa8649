"""The native libraries of csrc/, loaded with the package: which device types they serve, and why no others."""

import functools
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).parents[1]


def _load(device_type: str) -> str | None:
    """Load the library of a device type; returns the reason if that fails."""
    path = _FOLDER / f"native_{device_type}.so"
    if not path.exists():
        return f"{path.name} has not been built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)
    return None


def _load_all() -> dict[str, str]:
    """Load every library; returns the reasons by device type for those that are missing."""
    missing = {}
    if reason := _load("cpu"):
        # the schemas are in there
        return {"cpu": reason, "cuda": reason}
    torch.library.register_fake("meanflow_kernels::adamw_ema", lambda *args: None)
    if reason := _load("cuda"):
        missing["cuda"] = reason
    return missing


MISSING = _load_all()
"""Why a device type has no native operator, by device type; empty when all have."""


@functools.cache
def warn_missing(device_type: str) -> None:
    """Say once in a process that plain torch serves a device type, and why."""
    warnings.warn(
        f"adamw_ema runs on plain torch for {device_type} tensors, in many passes over memory instead of one: "
        f"{MISSING[device_type]}. Build the native operator by `pip install --no-build-isolation -e .` with a C++ "
        "compiler (and nvcc for CUDA).",
        RuntimeWarning,
        stacklevel=5,
    )
