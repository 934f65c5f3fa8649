"""Weights of the official improved MeanFlow, of its JAX and its PyTorch code, in this project's ImfDiT, and back.

Ours packs q, k and v of a block in one weight, and w1 and w3, and stores the MLPs' hidden width padded with zeros.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError, require
from ..model.imf import padded
from ..model.transformer import TOKENS
from ..recipe import IMF_OPTIONS


def _linear(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}/_flax_linear/kernel" for name in names)


# ours: the official ones that it holds, one above the other
_OF_A_BLOCK = {
    "norm1": ("norm1/kernel",),
    "norm2": ("norm2/kernel",),
    "gate_msa": ("attn_scale",),
    "gate_mlp": ("mlp_scale",),
    "attn.q_norm": ("attn/q_norm/kernel",),
    "attn.k_norm": ("attn/k_norm/kernel",),
    "attn.qkv.weight": _linear("attn/q_proj", "attn/k_proj", "attn/v_proj"),
    "attn.proj.weight": _linear("attn/out_proj"),
    "mlp.fc1.weight": _linear("mlp/w1", "mlp/w3"),
    "mlp.fc2.weight": _linear("mlp/w2"),
}
_EMBEDDERS = {"h": "h", "omega": "omega", "t_min": "cfg_t_start", "t_max": "cfg_t_end"}
_LEAVES = {"weight": "kernel", "bias": "bias"}
_OUTSIDE = {
    "y_embedder.embedding_table.weight": "y_embedder/embedding_table/_flax_embedding/embedding",
    **{f"{name}_tokens": f"{name}_tokens" for name in TOKENS},
    **{f"{head}_final_layer.norm": f"{head}_final_layer/norm/kernel" for head in "uv"},
}
for _ours, _theirs in _LEAVES.items():
    _OUTSIDE[f"x_embedder.proj.{_ours}"] = f"x_embedder/proj/{_theirs}"
    for _head in "uv":
        _OUTSIDE[f"{_head}_final_layer.linear.{_ours}"] = f"{_head}_final_layer/linear/_flax_linear/{_theirs}"
    for _name, _official in _EMBEDDERS.items():
        for _i in (0, 2):
            _path = f"{_official}_embedder/mlp/layers_{_i}/_flax_linear/{_theirs}"
            _OUTSIDE[f"{_name}_embedder.mlp.{_i}.{_ours}"] = _path

_NAMES = {path: name for name, path in _OUTSIDE.items()}
_NAMES_OF_A_BLOCK = {path: (name, i) for name, paths in _OF_A_BLOCK.items() for i, path in enumerate(paths)}
_BLOCK = re.compile(r"(shared_blocks|u_heads|v_heads)[_.](\d+)[/.](.+)")
# what holds the network: params, net
_ABOVE = re.compile(r"^(?:[^/]+/)*?(?=\w+_(?:blocks_\d+|heads_\d+|layer|embedder)/|\w+_tokens$)")


def from_official(params: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Official parameters as a state dict of :class:`meanflow.model.imf.ImfDiT`.

    Args:
        params: {flax path: array}, for instance ``shared_blocks_0/attn/q_proj/_flax_linear/kernel``. What stands before
            the network's own names (``params/net/``, as in the released checkpoints) is dropped. Gradients convert the
            same way.

    Returns:
        {name: tensor}, in the arrays' dtype. Linear kernels (in, out) are transposed, the patch kernel (p, p, in, out)
        becomes (out, in, p, p).

    Raises:
        UserError: for a path that is not of the official network, or a part of a packed weight alone.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for path, array in params.items():
        name, i = _name(_ABOVE.sub("", path), path)
        parts.setdefault(name, {})[i] = _tensor(path, np.asarray(array))
    return {name: _packed(name, pieces) for name, pieces in parts.items()}


def to_official(tensors: Mapping[str, Tensor], mlp_hidden: int) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_official`: a state dict as {flax path without ``net/``: array}, bit for bit.

    mlp_hidden: the MLPs' width without padding.
    """
    arrays = {}
    for name, x in tensors.items():
        for path, piece in zip(_paths(name), _pieces(name, x, mlp_hidden), strict=True):
            arrays[path] = _array(path, piece)
    return arrays


def flax_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The state dict of the official PyTorch code ({``net.shared_blocks.0...``: tensor}) as {flax path: array}."""
    arrays = {}
    for name, x in tensors.items():
        path = _flax_path(name)
        arrays[path] = _array(path, x)
    return arrays


def from_official_torch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`from_official` for the state dict of the official PyTorch code."""
    return from_official(flax_arrays(tensors))


def to_official_torch(tensors: Mapping[str, Tensor], mlp_hidden: int) -> dict[str, Tensor]:
    """The inverse of :func:`from_official_torch`, with the leading ``net.`` of the released files."""
    return {_torch_name(path): _tensor(path, array) for path, array in to_official(tensors, mlp_hidden).items()}


def is_improved(params: Mapping[str, np.ndarray]) -> bool:
    """Whether official parameters are of improved MeanFlow's network: it has a last layer for u."""
    return any("u_final_layer/" in path for path in params)


def infer_improved(params: Mapping[str, np.ndarray], *, input_size: int | None = None) -> ModelConfig:
    """Infer the shape of the network from its official parameters.

    Args:
        params: {flax path: array}. input_size: of the latents, which no array tells (default: 32).

    Raises:
        UserError: for what is no such network.
    """
    arrays = {_ABOVE.sub("", path): x for path, x in params.items()}
    try:
        patch, _, channels, width = arrays["x_embedder/proj/kernel"].shape
        classes = len(arrays["y_embedder/embedding_table/_flax_embedding/embedding"]) - 1
        mlp_hidden = arrays["u_heads_0/mlp/w1/_flax_linear/kernel"].shape[1]
        head_dim = len(arrays["u_heads_0/attn/q_norm/kernel"])
    except (KeyError, ValueError) as error:
        raise UserError(f"checkpoint: got no {error}, wanted the official iMF network; name another") from None
    blocks = {(block[1], block[2]) for block in map(_BLOCK.fullmatch, arrays) if block}
    shared, heads = (sum(group == name for group, _ in blocks) for name in ("shared_blocks", "u_heads"))
    # half a unit more, so that it is rounded down to the width
    mlp_ratio = 8 / 3 if int(width * (8 / 3)) == mlp_hidden else (mlp_hidden + 0.5) / width
    sizes = (shared + heads, width, width // head_dim, patch, input_size or 32, channels, classes)
    return ModelConfig(*sizes, **IMF_OPTIONS | {"mlp_ratio": mlp_ratio, "head_depth": heads})


def with_v_head(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A network for sampling, completed for training: v's head begins as a copy of u's.

    That is v's own meaning: u(z, r, t) is v(z, t) at r = t, where training asks for v. A last layer of v without its
    blocks, which the official files for sampling hold, gives way to u's.
    """
    heads = {"u_heads.": "v_heads.", "u_final_layer.": "v_final_layer."}
    if model.network == "dit":
        own = range(model.depth - model.head_depth, model.depth)
        heads = {f"blocks.{i}.": f"blocks.{i + model.head_depth}." for i in own} | {"final_layer.": "v_final_layer."}
    copies = {
        v + name.removeprefix(u): x.clone()
        for u, v in heads.items()
        for name, x in tensors.items()
        if name.startswith(u)
    }
    return dict(tensors) | copies


def _name(path: str, whole: str) -> tuple[str, int]:
    """Our name of a flax path, and which of the pieces it holds."""
    block = _BLOCK.fullmatch(path)
    if block:
        heads, index, inner = block.groups()
        name, i = _NAMES_OF_A_BLOCK.get(inner, ("", 0))
        name = name and f"{heads}.{index}.{name}"
    else:
        name, i = _NAMES.get(path, ""), 0
    require(
        name != "", "params", whole, "a path of the official iMF network (shared_blocks_<i>, u_heads_<i>, ...)",
        "pass the flattened parameter tree of the network alone",
    )  # fmt: skip
    return name, i


def _paths(name: str) -> tuple[str, ...]:
    """The flax paths of what our parameter holds."""
    block = _BLOCK.fullmatch(name)
    if block:
        heads, index, inner = block.groups()
        return tuple(f"{heads}_{index}/{path}" for path in _OF_A_BLOCK[inner])
    return (_OUTSIDE[name],)


def _packed(name: str, pieces: dict[int, Tensor]) -> Tensor:
    """Official weights, as (out, in), as our one."""
    wanted = _paths(name)
    require(
        len(pieces) == len(wanted), "params", f"{len(pieces)} of the weights of {name}", " and ".join(wanted),
        "pass the whole network",
    )  # fmt: skip
    if name.endswith("mlp.fc2.weight"):
        return F.pad(pieces[0], (0, padded(pieces[0].shape[1]) - pieces[0].shape[1]))
    if name.endswith("mlp.fc1.weight"):
        pieces = {i: F.pad(x, (0, 0, 0, padded(len(x)) - len(x))) for i, x in pieces.items()}
    return torch.cat([pieces[i] for i in range(len(pieces))])


def _pieces(name: str, x: Tensor, mlp_hidden: int) -> list[Tensor]:
    """Our weight as the official ones, (out, in)."""
    if name.endswith("mlp.fc2.weight"):
        return [x[:, :mlp_hidden]]
    pieces = list(x.chunk(len(_paths(name))))
    return [x[:mlp_hidden] for x in pieces] if name.endswith("mlp.fc1.weight") else pieces


def _tensor(path: str, array: np.ndarray) -> Tensor:
    if path.endswith("kernel") and array.ndim > 1:
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return torch.from_numpy(np.array(array))  # a contiguous copy


def _array(path: str, x: Tensor) -> np.ndarray:
    array = x.detach().cpu().numpy()
    if path.endswith("kernel") and array.ndim > 1:
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return np.ascontiguousarray(array)


def _torch_name(path: str) -> str:
    path = re.sub(r"(blocks|heads)_(\d+)/", r"\1/\2/", path)
    path = re.sub(r"layers_(\d+)/", r"\1/", path)
    return "net." + re.sub(r"/(kernel|embedding)$", "/weight", path).replace("/", ".")


_FLAX_PATHS = {_torch_name(path): path for path in _OUTSIDE.values()}
_FLAX_PATHS_OF_A_BLOCK = {_torch_name(path): path for paths in _OF_A_BLOCK.values() for path in paths}


def _flax_path(name: str) -> str:
    inside = name.removeprefix("net.")
    block = _BLOCK.fullmatch(inside)
    if block:
        heads, index, inner = block.groups()
        path = _FLAX_PATHS_OF_A_BLOCK.get(f"net.{inner}")
        return name if path is None else f"{heads}_{index}/{path}"
    return _FLAX_PATHS.get(f"net.{inside}", name)
