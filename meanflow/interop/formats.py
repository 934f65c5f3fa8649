"""Formats of weights: detected by content; runs read, with the names of their classes."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError, require
from ..storage import checkpoint as ckpt
from ..storage.foreign import is_safetensors

CLASSES = "classes.json"
"""File of a run folder with the names of its classes by number, if the data has them."""
ORBAX = {"manifest.ocdbt", "_METADATA", "_CHECKPOINT_METADATA"}


def find_format(path: Path) -> str:
    """Detect the format of a file or folder by its content; "" for a file of tensors, whose families look alike.

    Raises:
        UserError: where there is nothing.
    """
    require(path.exists(), "source", str(path), "a file or folder", "check the path")
    if path.is_dir():
        names = {p.name for p in path.iterdir()}
        if "model_index.json" in names:
            return "pipeline"
        return "official" if names & ORBAX or any(name.startswith("checkpoint_") for name in names) else "run"
    with path.open("rb") as file:
        head = file.read(4)
    if is_safetensors(path):
        return "run" if _is_ours(path) else ""
    if head == b"PK\x03\x04" or head[:1] == b"\x80" or path.suffix in (".pt", ".pth", ".ckpt"):
        return ""
    # flax files begin with msgpack's code for a small map
    return "official" if path.name.startswith("checkpoint_") or b"\x81" <= head[:1] <= b"\x8f" else "run"


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == ckpt.WEIGHTS_FORMAT
    except (OSError, SafetensorError):
        return True  # damaged: let the reader say how


def load_run(path: Path, weights: str) -> tuple[dict[str, Tensor], dict, Path, int]:
    """Read tensors, configuration, path and step of a checkpoint, a run folder's last one, or an exported file."""
    if path.is_file() or path.suffix == ".safetensors":
        tensors, config, step = ckpt.load_weights(path)
        return tensors, config, path, step
    found = ckpt.checkpoints(path / ckpt.FOLDER) or ckpt.checkpoints(path) or [path]
    path = found[-1]
    if not (path / ckpt.HEADER).exists():
        raise UserError(
            f"checkpoint: got {path}, where there is none, wanted a run folder, a checkpoint, exported weights or a "
            "pipeline; train first"
        )
    header = ckpt.read_header(path)
    ckpt.verify(path, header, ema_only=weights == "ema")
    names = known_names(path)
    config = header.config | ({"classes": names} if names else {})
    return ckpt.load_network(path, weights), config, path, header.step


def known_names(path: Path) -> dict[str, str]:
    """Names of the classes by number that lie beside weights: in a checkpoint's run, a file, a pipeline; else none."""
    kind = find_format(path)
    if kind == "pipeline":
        return json.loads((path / "model_index.json").read_text()).get("id2label") or {}
    if kind != "run":
        return {}
    if path.is_dir():
        names = next((p for p in (path / CLASSES, home(path) / CLASSES) if p.exists()), None)
        return read_names(str(names)) if names else {}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]).get("classes", {})


def read_names(source: str) -> dict[str, str]:
    """Read names of classes by number: "imagenet", a JSON object {number: name}, or a text file with one name per line.

    Raises:
        UserError: where they cannot be read.
    """
    path = Path(__file__).with_name("imagenet_classes.txt") if source == "imagenet" else Path(source)
    try:
        text = path.read_text()
        names = json.loads(text) if path.suffix == ".json" else dict(enumerate(text.splitlines()))
        return {str(int(i)): str(name) for i, name in names.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"names: got {source}, which cannot be read ({error}), wanted imagenet, JSON or a name a line; correct it"
        ) from None


def require_plain_dit(model: ModelConfig) -> None:
    """Refuse networks that the formats of other code bases, and MeanFlow's official one, do not know.

    Raises:
        UserError: for any but MeanFlow's DiT.
    """
    hint = "take weights, or official or imf for improved MeanFlow's own network"
    require(not model.beyond_dit, "model", model.beyond_dit, "MeanFlow's own DiT for this format", hint)


def home(path: Path) -> Path:
    """The folder for files made from weights: that of their run, or their own."""
    return path.parent.parent if path.parent.name == ckpt.FOLDER else path.parent
