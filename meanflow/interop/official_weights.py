"""Convert weights of the official JAX implementation to this project's DiT, and back."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# DiT's module names hide behind flax's wrappers: layers_<i> for a list entry, and one level for the wrapped layer
_WRAPPERS = re.compile(r"/(_flax_linear|_flax_embedding)/")
_LIST_ENTRY = re.compile(r"layers_(\d+)")
# what holds the network: params, net, a wrapper's name
_ABOVE = re.compile(r"^(?:[^/]+/)*?(?=(?:blocks|\w+_layer|\w+_embedder)/)")
_LEAVES = {"kernel": "weight", "embedding": "weight", "bias": "bias"}


def from_official(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert official parameters to a state dict of :class:`meanflow.model.dit.DiT`.

    Args:
        params: {flax path: array}, for instance ``blocks/layers_0/attn/qkv/_flax_linear/kernel``. What stands
            before the network's own names (``params/net/``, as in the released checkpoints) is dropped. Gradients
            convert the same way.

    Returns:
        {name: tensor}, in the arrays' dtype. Linear kernels (in, out) are transposed, the patch kernel (p, p, in, out)
        becomes (out, in, p, p).

    Raises:
        ValueError: for a path that is not of the official network.
    """
    return {_name(path): _tensor(path, np.asarray(array)) for path, array in params.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Invert :func:`from_official`: a state dict to {flax path without ``net/``: array}, bit for bit."""
    return {_path(name): _array(name, x) for name, x in tensors.items()}


def _path(name: str) -> str:
    *modules, leaf = name.split(".")
    modules = [f"layers_{module}" if module.isdigit() else module for module in modules]
    if modules[0] == "x_embedder":
        wrapper, leaf = [], {"weight": "kernel"}.get(leaf, leaf)
    elif modules[-1] == "embedding_table":
        wrapper, leaf = ["_flax_embedding"], "embedding"
    else:
        wrapper, leaf = ["_flax_linear"], {"weight": "kernel"}.get(leaf, leaf)
    return "/".join([*modules, *wrapper, leaf])


def _array(name: str, x: Tensor) -> np.ndarray:
    array = x.detach().cpu().numpy()
    if name.endswith("weight") and not name.endswith("embedding_table.weight"):
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array)


def _name(path: str) -> str:
    *modules, leaf = _LIST_ENTRY.sub(r"\1", _WRAPPERS.sub("/", _ABOVE.sub("", path))).split("/")
    if leaf not in _LEAVES or not modules:
        raise ValueError(
            f"params: got the path {path!r}, wanted official MeanFlow paths that end in kernel, bias or embedding; "
            "pass the flattened parameter tree of the network alone"
        )
    if modules[0] == "blocks" or modules[0].endswith("_layer") or modules[0].endswith("_embedder"):
        return ".".join([*modules, _LEAVES[leaf]])
    raise ValueError(
        f"params: got the path {path!r}, wanted one of the official DiT (blocks, x/t/h/y_embedder, final_layer); "
        "pass the flattened parameter tree of the network alone"
    )


def _tensor(path: str, array: np.ndarray) -> Tensor:
    if path.endswith("kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return torch.from_numpy(np.array(array))  # a contiguous copy
