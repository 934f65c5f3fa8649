"""Numbers computed by the official implementation, and the bars they are compared at.

The arrays lie in tests/data/oracle (its README.md says how they were made); MEANFLOW_ORACLE_DIR names another set.
"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch

from meanflow.interop.official_weights import from_official
from meanflow.model.dit import DiT

FOLDER = Path(os.environ.get("MEANFLOW_ORACLE_DIR") or Path(__file__).parent / "data" / "oracle")

MODES = {"f64": torch.float64, "f32": torch.float32}
# relative to the largest entry; the official program's own fp32 noise is of the size of the fp32 bars
F64, F64_STORED_AS_F32 = 1e-10, 1e-6
F32 = {"u": 2e-5, "derived": 1e-4, "grad": 2e-4, "table": 5e-5}


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def settings(data: dict, key: str) -> dict:
    """A JSON string of the file."""
    return json.loads(str(data[key]))


def group(data: dict, prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, which is cut off."""
    return {key.removeprefix(prefix): array for key, array in data.items() if key.startswith(prefix)}


def tensor(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An array as a tensor; latents (B, H, W, C) become (B, C, H, W), labels int64."""
    x = torch.from_numpy(np.array(array))
    x = x.long() if x.dtype == torch.int32 else x.to(dtype) if x.is_floating_point() and dtype else x
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x


def network(name: str, dtype: torch.dtype) -> DiT:
    """The network of a file, with its weights."""
    data = load(name)
    net = DiT(**settings(data, "config"))
    net.load_state_dict(from_official(group(data, "params/")))
    return net.to(dtype)


def assert_close(
    got: torch.Tensor,
    wanted: np.ndarray | torch.Tensor,
    mode: str,
    kind: str,
    name: str = "",
    stored_as_f32: float = F64_STORED_AS_F32,
) -> None:
    """Within the bar of the mode and kind, relative to the largest entry of the official array."""
    wanted = tensor(wanted) if isinstance(wanted, np.ndarray) else wanted
    bar = F32[kind] if mode == "f32" else F64 if wanted.dtype == torch.float64 else stored_as_f32
    got, wanted = got.detach().double(), wanted.double()
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, official {tuple(wanted.shape)}"
    error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300)
    assert error <= bar, f"{name}: error {error:.2e} over the bar {bar:.0e}"
