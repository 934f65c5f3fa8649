"""Checkpoints of flax.training.checkpoints, read and written without flax.

    checkpoint_300240     a file: msgpack, in which an array is an extension holding (shape, dtype, bytes)
    checkpoint_300240/    a folder: Orbax's, what newer flax writes; read by the package tensorstore

Both hold a train state: step, params, ema_params, opt_state. Nothing is unpickled.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgpack
import numpy as np

from ..errors import UserError

ARRAY, SCALAR = 1, 3
"""Codes of flax's msgpack extensions."""
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30
TREES = {"ema": "ema_params", "model": "params"}


def read_flax(path: Path, weights: str = "ema") -> tuple[dict[str, np.ndarray], int, Path]:
    """Read the parameters of a checkpoint, or of the last one in a folder.

    Args:
        weights: "ema" for the averaged ones, "model" for those in training.

    Returns:
        {path with "/" between its levels: array}, the step, and which checkpoint it was.

    Raises:
        UserError: if there is none, or a damaged or foreign one.
    """
    path = _newest(path)
    state = _read_orbax(path, TREES[weights]) if path.is_dir() else read_msgpack(path)
    try:
        step, tree = int(state["step"]), state[TREES[weights]]
        arrays = {"/".join(keys): np.asarray(x) for keys, x in _leaves(tree)}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _foreign(path, f"without step and {TREES[weights]}") from None
    if not arrays:
        raise _foreign(path, f"whose {TREES[weights]} are empty")
    return arrays, step, path


def write_flax(path: Path, ema: Mapping[str, np.ndarray], model: Mapping[str, np.ndarray], step: int) -> None:
    """Write a msgpack checkpoint of these parameters and an optimizer (optax.adamw) that has not stepped yet.

    Args:
        ema, model: {path with "/": array}. path: of the file; flax looks for "checkpoint_" and the step.

    Raises:
        UserError: where the file cannot be written.
    """
    zeros = {key: np.zeros_like(x) for key, x in model.items()}
    adam = {"count": np.array(step, np.int32), "mu": _tree(zeros), "nu": _tree(zeros)}
    state = {
        "step": step,
        "params": _tree(model),
        "opt_state": {"0": adam, "1": {}, "2": {}},
        "ema_params": _tree(ema),
    }
    write_msgpack(path, state)


def read_msgpack(path: Path) -> object:
    """Read the tree of a file of flax.serialization.msgpack_serialize; arrays are numpy's.

    Raises:
        UserError: for a file that cannot be read or is something else.
    """
    try:
        tree = msgpack.unpackb(path.read_bytes(), ext_hook=_unpack, raw=False, strict_map_key=False)
        return _join(tree)
    except OSError as error:
        raise UserError(
            f"checkpoint: got {path}, which cannot be read ({error}), wanted a file; name another"
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise _foreign(path, f"which is not whole ({type(error).__name__}: {error})") from None


def write_msgpack(path: Path, tree: Mapping) -> None:
    """Write a tree as flax.serialization.msgpack_serialize does, byte for byte, by way of a partial file.

    Raises:
        UserError: where it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgpack.packb(_split(tree), default=_pack, strict_types=True))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"out: got {path}, which cannot be written ({error}), wanted room; name another") from None


def _pack(value: object) -> msgpack.ExtType:
    array = np.asarray(value)
    code = SCALAR if isinstance(value, np.generic) else ARRAY
    return msgpack.ExtType(code, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def _unpack(code: int, data: bytes) -> np.ndarray | np.generic:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"extension {code}")
    shape, dtype, buffer = msgpack.unpackb(data, raw=True)
    if dtype == b"bfloat16":  # the upper half of an fp32, which numpy does not know
        array = (np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    else:
        array = np.frombuffer(buffer, np.dtype(dtype.decode())).reshape(shape)
    return array[()] if code == SCALAR else array


def _join(tree: object) -> object:
    """Join the pieces of a tree's large arrays."""
    if not isinstance(tree, dict):
        return tree
    if CHUNKED in tree:
        chunks, shape = (list(_join(tree[key]).values()) for key in ("chunks", "shape"))
        return np.concatenate(chunks).reshape(shape)
    return {key: _join(value) for key, value in tree.items()}


def _split(tree: object) -> object:
    """Split a tree's arrays of more than 1 GiB into pieces: msgpack's length fields are 32-bit."""
    if isinstance(tree, np.ndarray) and tree.nbytes > CHUNK_BYTES:
        size = max(1, CHUNK_BYTES // tree.itemsize)
        flat = tree.reshape(-1)
        chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
        numbered = [{str(i): x for i, x in enumerate(values)} for values in (tree.shape, chunks)]
        return {CHUNKED: True, "shape": numbered[0], "chunks": numbered[1]}
    return {key: _split(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _leaves(tree: Mapping, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _tree(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *above, leaf = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _newest(path: Path) -> Path:
    """Return the checkpoint itself, or a folder's checkpoint of the largest step."""
    if path.is_dir() and not _is_orbax(path):
        found = [p for p in path.iterdir() if re.fullmatch(r"checkpoint_\d+", p.name)]
        if not found:
            raise _foreign(path, "a folder without checkpoints")
        path = max(found, key=lambda p: int(p.name.removeprefix("checkpoint_")))
    return path


def _is_orbax(path: Path) -> bool:
    return any((path / name).exists() for name in ("manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA"))


def _read_orbax(path: Path, tree: str) -> dict:
    """Read step and one tree of parameters of an Orbax folder: zarr arrays named by their keys joined with dots."""
    try:
        import tensorstore
    except ImportError:
        raise UserError(
            f"checkpoint: got {path}, an Orbax folder, wanted the package tensorstore to read it with; "
            "pip install tensorstore"
        ) from None
    base = f"file://{path.resolve()}/"
    whole = {"driver": "ocdbt", "base": base} if (path / "manifest.ocdbt").exists() else base
    try:
        store = tensorstore.KvStore.open(whole).result()
        keys = [key.decode().removesuffix("/.zarray") for key in store.list().result() if key.endswith(b"/.zarray")]
        wanted = [key for key in keys if key == "step" or key.startswith(tree + ".")]
        specs = {key: {"driver": "zarr", "kvstore": (store / f"{key}/").spec().to_json()} for key in wanted}
        arrays = {key: tensorstore.open(spec).result().read().result() for key, spec in specs.items()}
    except (ValueError, OSError) as error:
        raise _foreign(path, f"which cannot be read ({str(error).splitlines()[0]})") from None
    flat = {key.removeprefix(tree + ".").replace(".", "/"): x for key, x in arrays.items() if key != "step"}
    return {"step": arrays["step"], tree: _tree(flat)} if "step" in arrays else {}


def _foreign(path: Path, what: str) -> UserError:
    return UserError(
        f"checkpoint: got {path}, {what}, wanted a checkpoint of flax.training.checkpoints (a train state with step, "
        "params and ema_params); name another"
    )
