"""Numbers computed by the official implementation of improved MeanFlow.

The arrays lie in tests/data/oracle_imf (its README.md says how they were made); IMF_ORACLE_DIR names another set.
"""

import functools
import os
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import torch
from oracle import group, settings, tensor  # noqa: F401, for the tests

from meanflow.interop.imf_weights import from_official
from meanflow.model.imf import ImfDiT

FOLDER = Path(os.environ.get("IMF_ORACLE_DIR") or Path(__file__).parent / "data" / "oracle_imf")
MODES = oracle.MODES
# arrays computed in fp64 and stored in fp32 are off by their rounding, 6e-8
assert_close = functools.partial(oracle.assert_close, stored_as_f32=1e-7)


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def networks() -> list[str]:
    """The files of networks that the set has."""
    return sorted(path.stem for path in FOLDER.glob("imf_net_*.npz"))


def options(config: dict) -> dict:
    """An official configuration in our words."""
    same = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    mlp_hidden = int(config["hidden_size"] * config["mlp_ratio"])
    return {key: config[key] for key in same} | {"head_depth": config["aux_head_depth"], "mlp_hidden": mlp_hidden}


def network(name: str, dtype: torch.dtype, **others) -> ImfDiT:
    """The network of a file, with its weights."""
    data = load(name)
    net = ImfDiT(**options(settings(data, "config")), **others)
    net.load_state_dict(from_official(group(data, "params/")))
    return net.to(dtype)
