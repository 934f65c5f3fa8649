"""Labelled images to be encoded: class folders, tar files, Hugging Face image sets, in an order that never changes."""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .errors import UserError, require

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
HUB = "hub:"


class Source(Protocol):
    """A list of labelled images."""

    kind: str
    names: list[str]
    """What each image is called, for messages and the list of those left out."""
    labels: np.ndarray
    """(N,) int64."""
    classes: list[str] | None
    """Their names by label, where they are known."""

    def read(self, index: int) -> bytes:
        """An image's file. Called from several threads."""
        ...


class ClassFolders:
    """A folder for each class; labels count the sorted folders' names, as torchvision's ImageFolder does."""

    kind = "class folders"

    def __init__(self, path: Path):
        self.path = path
        self.classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        self.names, labels = [], []
        for label, name in enumerate(self.classes):
            files = sorted(self._images(path / name))
            self.names += files
            labels += [label] * len(files)
        self.labels = np.array(labels, np.int64)

    def _images(self, folder: Path) -> Iterable[str]:
        for root, _, files in os.walk(folder, followlinks=True):
            relative = Path(root).relative_to(self.path)
            yield from (str(relative / name) for name in files if name.lower().endswith(IMAGE_ENDINGS))

    def read(self, index: int) -> bytes:
        return (self.path / self.names[index]).read_bytes()


class TarFiles:
    """WebDataset's layout: in uncompressed tar files, KEY.jpg beside KEY.cls, which holds the label as a number.

    The images keep the tar files' order, files sorted by name.
    """

    kind = "tar files"
    classes = None

    def __init__(self, files: list[Path]):
        self.names, self._places, labels = [], [], []
        for path in files:
            images, classes = {}, {}
            try:
                with tarfile.open(path, "r:") as tar:  # plain tar only: reading in any order needs seeking
                    for member in tar:
                        folder, _, name = member.name.rpartition("/")
                        key, _, ending = name.partition(".")
                        key = f"{folder}/{key}" if folder else key
                        if not member.isfile():
                            continue
                        if f".{ending.lower()}".endswith(IMAGE_ENDINGS):
                            images[key] = (path, member.offset_data, member.size)
                        elif ending == "cls":
                            classes[key] = int(tar.extractfile(member).read())
            except (OSError, tarfile.TarError, ValueError) as error:
                raise UserError(
                    f"source: got {path}, which cannot be read ({error}), wanted a plain tar file of KEY.jpg and "
                    "KEY.cls (a number); unpack it if it is compressed"
                ) from None
            missing = next((key for key in images if key not in classes), None)
            if missing is not None:
                raise UserError(f"source: got {missing} of {path} without a label, wanted {missing}.cls; add it")
            self.names += [f"{path.name}:{key}" for key in images]
            self._places += images.values()
            labels += [classes[key] for key in images]
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class HuggingFace:
    """An image set of the package `datasets`, saved on disk or of the hub: its column of images and one of labels."""

    kind = "Hugging Face datasets"

    def __init__(self, name: str, split: str):
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"source: got {name}, but the package datasets is not here ({error}), wanted it for such a set; "
                "pip install datasets"
            ) from None
        try:
            if name.startswith(HUB):
                data = datasets.load_dataset(name.removeprefix(HUB), split=split)
            else:
                data = datasets.load_from_disk(name)
                data = data[split] if isinstance(data, datasets.DatasetDict) else data
        except Exception as error:  # of a dozen packages, from the network's to the file system's
            reason = " ".join(str(error).split()[:40])
            raise UserError(
                f"source: got {name}, split {split}, which cannot be loaded ({reason}), wanted an image set; "
                f"name a folder written by save_to_disk, or {HUB}NAME, and its --split"
            ) from None
        columns = data.features.items()
        image = next((name for name, feature in columns if isinstance(feature, datasets.Image)), None)
        label = next((name for name, feature in columns if isinstance(feature, datasets.ClassLabel)), None)
        require(
            image is not None and label is not None,
            f"source {name}", list(data.features), "a column of type Image and one of type ClassLabel", "cast them",
        )  # fmt: skip
        self.classes = list(data.features[label].names)
        self.labels = np.array(data[label], np.int64)
        self.names = [f"{split}:{i}" for i in range(len(data))]
        self._column, self._images = (
            image,
            data.cast_column(image, datasets.Image(decode=False)).select_columns([image]),
        )

    def read(self, index: int) -> bytes:
        image = self._images[index][self._column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def open_source(name: str, split: str = "train") -> Source:
    """The images of a path, or of `hub:NAME`.

    Raises:
        UserError: for a path that is not there, or holds no labelled images.
    """
    path, kinds = Path(name), "class folders of images, tar files of KEY.jpg and KEY.cls, or a Hugging Face image set"
    if name.startswith(HUB) or (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        source = HuggingFace(name, split)
    elif path.is_dir():
        path = path / split if (path / split).is_dir() else path
        tars = sorted(path.glob("*.tar"))
        source = TarFiles(tars) if tars else ClassFolders(path)
    elif path.is_file():
        source = TarFiles([path])
    else:
        raise UserError(f"source: got {name}, which is not there, wanted {kinds}; correct the path")
    if not source.names:
        raise UserError(f"source: got {path}, which holds no images, wanted {kinds}; name another folder")
    return source


def fingerprint(names: Iterable[str], labels: Iterable[int]) -> str:
    """SHA-256 of a list of names with labels, in order."""
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\t{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def decode(file: bytes) -> tuple[Image.Image, str]:
    """An image file as RGB, and the mode that it was stored in.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: where it cannot be decoded.
    """
    image = Image.open(io.BytesIO(file))
    return image.convert("RGB"), image.mode


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol, arXiv 2105.05233, appendix; guided-diffusion's image_datasets.py).

    Halved by box filters while the shorter side is at least twice the size, then resized by a bicubic filter until it
    is the size, then cut out of the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
