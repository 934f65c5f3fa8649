"""State dicts of other projects: read safely, found in whatever holds them, under plain names.

Wrappers add words to parameters' names, and training code saves a network inside a dict of other things:

    module. (DDP, AveragedModel)   _orig_mod. (torch.compile)   _fsdp_wrapped_module. ...   anywhere, dropped
    model.  net.  ema.  ...        in front, whatever they are: found by the one name that every such network has
    n_averaged, decay, step ...    counters beside the parameters, dropped
    {"model": ..., "ema": ..., "opt": ...}, {"state_dict": ...}   looked into
"""

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError, nearest

ANCHOR = "x_embedder.proj.weight"
"""A name that every DiT and SiT has, and nothing else in a checkpoint."""
WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
AVERAGES = {"ema", "average", "averaged", "avg", "shadow", "swa"}
COUNTERS = ("steps", "step", "global_step", "train_steps")
DEEPEST = 8
"""Deepest level of dicts to look into; a file may hold a dict that holds itself."""


class Network(NamedTuple):
    """A network found in a file."""

    where: str
    """Prefix of its names, such as "ema." or ""."""
    tensors: dict[str, Tensor]
    averaged: bool
    """Whether it is a moving average, by its name or a counter beside it."""


def read_network(path: Path, weights: str = "ema") -> tuple[dict[str, Tensor], int, str]:
    """Read the network of a file of tensors (torch's or safetensors, whatever it is called).

    Args:
        weights: "ema" or "model", if the file has both; else the one it has is read.

    Returns:
        {plain name: tensor} with 16-bit and 8-bit numbers in fp32, the step, and which weights they are.

    Raises:
        UserError: if it cannot be read, would run code when unpickled, or holds no such network.
    """
    held = _read_safetensors(path) if is_safetensors(path) else _read_torch(path)
    if not isinstance(held, Mapping):
        raise _refused(path, f"which holds a {type(held).__name__}")
    networks = list(_networks(held))
    if not networks:
        names = [name for name, _ in _tensors(held)]
        near = f", nearest to it {nearest(ANCHOR, names)}" if names else ""
        raise _refused(path, f"without the state dict of a DiT or SiT: no {ANCHOR}{near}")
    step = next((count for name in COUNTERS if isinstance(count := held.get(name), int)), 0)
    network = _choose(path, networks, weights)
    if network.averaged or network.where == "model.":
        weights = "ema" if network.averaged else "model"
    return {name: full(x) for name, x in network.tensors.items()}, step, weights


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its first bytes: a length, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def plain(name: str) -> str:
    """Drop the wrappers' words from a name."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def full(x: Tensor) -> Tensor:
    """Convert 16-bit and 8-bit floats to fp32."""
    return x.float() if x.is_floating_point() and x.itemsize < 4 else x


def _networks(held: Mapping, where: str = "", depth: int = 0) -> Iterator[Network]:
    """Find the networks in a mapping and in those it holds."""
    here: dict[str, Tensor] = {}
    for key, value in held.items():
        if isinstance(value, Tensor):
            here[plain(str(key))] = value
        elif isinstance(value, Mapping) and depth < DEEPEST:
            yield from _networks(value, f"{where}{key}.", depth + 1)
    prefixes = sorted((name.removesuffix(ANCHOR) for name in here if _is_anchor(name)), key=len, reverse=True)
    counted = {name.removesuffix("n_averaged") for name in here if name.split(".")[-1] == "n_averaged"}
    for prefix in prefixes:  # the longest first: "" would take them all
        mine = [name for name in here if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): x for name in mine if not _is_counter(x := here.pop(name))}
        words = re.split(r"[._]", f"{where}{prefix}".lower())
        yield Network(where + prefix, tensors, prefix in counted or not AVERAGES.isdisjoint(words))


def _is_anchor(name: str) -> bool:
    return name == ANCHOR or name.endswith("." + ANCHOR)


def _is_counter(x: Tensor) -> bool:
    return x.dim() == 0 or (x.numel() == 1 and not x.is_floating_point())


def _choose(path: Path, networks: list[Network], weights: str) -> Network:
    fitting = [network for network in networks if network.averaged == (weights == "ema")]
    named = [network for network in fitting if network.where == f"{weights}."]
    # a file of one network is that network, whatever it is called
    chosen = next((each for each in (named, fitting, networks) if len(each) == 1), None)
    if chosen is None:
        places = ", ".join(repr(network.where) for network in networks)
        raise _refused(path, f"with several networks, under {places}", f"one of them to be its {weights!r} by name")
    return chosen[0]


def _tensors(held: Mapping, where: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    for key, value in held.items():
        if isinstance(value, Tensor):
            yield f"{where}{key}", value
        elif isinstance(value, Mapping) and depth < DEEPEST:
            yield from _tensors(value, f"{where}{key}.", depth + 1)


def _read_torch(path: Path) -> object:
    try:
        # training checkpoints keep the command line's arguments, plain values in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:  # its name may mislead
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"which holds more than tensors or is damaged ({_first(error)})"
        raise _refused(path, what) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(path, f"which cannot be read ({_first(error)})") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _refused(path, f"which cannot be read ({_first(error)})") from None


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if "Unsupported" in line] or str(error).splitlines() or [""]
    return " ".join(lines[0].split()[:24])


def _refused(path: Path, what: str, wanted: str = "a .pt or .safetensors file of tensors") -> UserError:
    return UserError(
        f"checkpoint: got {path}, {what}, wanted {wanted}; name another, or have its owner save the state dict alone"
    )
