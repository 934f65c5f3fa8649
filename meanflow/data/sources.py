"""Sources of labelled images: class folders, tar files, Hugging Face image sets, in an order that never changes.

The rules for their entries are those of meanflow/data/entries.py.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError, require
from .decoding import centre_crop, decode
from .entries import HIDDEN, NO_DATA, Entries, holds_images, is_hidden, is_image, read_file, reason, shown, walk
from .labels import read_label
from .tars import TarFiles
from .vae import hub_answers

__all__ = ["ClassFolders", "HuggingFace", "Source", "TarFiles", "centre_crop", "decode", "fingerprint", "open_source"]

HUB = "hub:"
KINDS = "class folders of images, tar files of KEY.jpg and KEY.cls, or a Hugging Face image set"
DEFAULT_SPLIT = "train"
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Words that name a split, and what they mean."""
NO_CLASS, OTHER_SPLIT = "an image in no class folder", "of another split"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


class Source(Protocol):
    """A list of labelled images."""

    kind: str
    names: list[str]
    """Name of each image, for messages and the list of those left out."""
    labels: np.ndarray
    """(N,) int64."""
    classes: list[str] | None
    """Names of the classes by label, if known."""
    entries: Entries
    """The account of used and left-out entries."""

    def read(self, index: int) -> bytes:
        """Read an image's file, in any of several threads."""
        ...


class ClassFolders(Source):
    """A folder for each class; labels count the sorted folders' names, as torchvision's ImageFolder does.

    A class without images keeps its label, and is named: a download that failed does not move those of the others.
    """

    kind = "class folders"

    def __init__(self, path: Path):
        self.path, self.entries = path, Entries()
        self.classes, self.names, labels = [], [], []
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if is_hidden(entry.name):
                self.entries.leave_out(entry.name, HIDDEN)
            elif entry.is_dir():
                self.classes.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self.entries.refuse(f"source: got {shown(entry.name)}, a link to nothing, wanted a folder; correct it")
            else:
                self.entries.leave_out(entry.name, NO_CLASS if is_image(entry.name) else NO_DATA)
        for label, name in enumerate(self.classes):
            files = sorted(walk(path, name, self.entries))
            self.names += files
            labels += [label] * len(files)
        self.entries.close(len(self.names))
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> bytes:
        return read_file(self.path / self.names[index])


class HuggingFace(Source):
    """An image set of the package `datasets`, saved on disk or of the hub: its column of images and one of labels.

    Of several such columns those that are called "image" and "label" are taken.
    """

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
                config = datasets.DownloadConfig(local_files_only=not hub_answers())
                data = datasets.load_dataset(name.removeprefix(HUB), split=split, download_config=config)
            else:
                data = datasets.load_from_disk(name)
            alone = isinstance(data, datasets.Dataset) and not name.startswith(HUB)
            data = (data[split] if isinstance(data, datasets.DatasetDict) else data).with_format(None)
        except Exception as error:  # a dozen packages raise here, from network to file system
            raise UserError(
                f"source: got {name}, split {split}, which cannot be loaded ({' '.join(str(error).split()[:40])}), "
                f"wanted an image set; name a folder written by save_to_disk, or {HUB}NAME, and its --split"
            ) from None
        there = re.split(r"[^\w.-]", str(data.split or DEFAULT_SPLIT))[0]  # "train" of "train[:10%]"
        fits = not alone or not split or _meaning(there) == _meaning(split)
        require(fits, f"source {name}, split", split, f"{there}, the only one there", "name it by --split")
        image = self._column(name, data, datasets.Image, "image")
        label = self._column(name, data, datasets.ClassLabel, "label")
        self.classes, self.entries = list(data.features[label].names), Entries()
        self.names = [f"{split}:{i}" for i in range(len(data))]
        self.labels = np.array(self._labels(data[label][:], label), np.int64)
        self._image = image
        self._images = data.cast_column(image, datasets.Image(decode=False)).select_columns([image])

    @staticmethod
    def _column(source: str, data, kind: type, wanted: str) -> str:
        found = [name for name, feature in data.features.items() if isinstance(feature, kind)]
        found = [wanted] if wanted in found else found
        hint = f"cast a column to that type, or rename the one to learn from to {wanted!r}"
        got, type_wanted = found or list(data.features), f"one column of type {kind.__name__}"
        require(len(found) == 1, f"source {source}", got, type_wanted, hint)
        return found[0]

    def _labels(self, values: Iterable, column: str) -> list[int]:
        labels = []
        for name, value in zip(self.names, values, strict=True):
            try:
                labels.append(read_label(value, f"{column} of {name}").value)
                known, wanted = labels[-1] < len(self.classes), f"one of {len(self.classes)} classes"
                require(known, f"source: {column} of {name}", value, wanted, "correct the label")
            except UserError as error:
                self.entries.refuse(str(error))
        self.entries.close(len(labels))
        return labels

    def read(self, index: int) -> bytes:
        image = self._images[index][self._image]
        if image is None or image["bytes"] is None and image["path"] is None:
            raise ValueError("there is no image in this row")
        return image["bytes"] if image["bytes"] is not None else read_file(Path(image["path"]))


def _meaning(word: str) -> str:
    return SPLITS.get(word.lower(), word.lower())


def _folder_of_split(path: Path, split: str) -> Path:
    """Find the folder of a split: one of its name if the folder has splits, else the folder itself.

    A folder that is called as a split is a class where it holds images, but no folders or tar files with images, and
    others beside it are classes.

    Raises:
        UserError: where there is no such split, or a folder could be a split as well as a class.
    """
    if not split or "/" in split and (path / split).is_dir():
        return path / split
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and not is_hidden(e.name))
    splits = [name for name in folders if name.lower() in SPLITS or name == split]
    whole = [name for name in splits if _holds_source(path / name)]
    beside = next((name for name in folders if name not in splits and holds_images(path / name, depth=1)), None)
    if whole and beside is not None:
        raise UserError(
            f"source: got {shown(path)}, where {shown(whole[0])} looks like a split, for it holds folders or tar "
            f"files, and {shown(beside)} like a class, wanted splits or classes; name {shown(path / whole[0])}, or "
            "take all folders as classes by --split ''"
        )
    if split in whole or split in splits and beside is None:
        return path / split
    if (
        _meaning(path.absolute().name) == _meaning(split)
        or split == DEFAULT_SPLIT
        and (beside is not None or not splits)
    ):
        return path
    raise UserError(
        f"source: got the split {split!r} of {shown(path)}, which has "
        f"{'the splits ' + ', '.join(map(shown, splits)) if splits else 'no splits'}, wanted one that is there; "
        f"{'name it by --split' if splits else 'leave out --split'}"
    )


def _holds_source(path: Path) -> bool:
    """Whether a folder holds class folders or tar files."""
    return any(_is_tar(e) or e.is_dir() and holds_images(Path(e.path), depth=2) for e in os.scandir(path))


def _is_tar(entry: os.DirEntry) -> bool:
    is_file = entry.is_file() or not os.path.exists(entry.path)  # a link to nothing is refused when it is opened
    return entry.name.lower().endswith(".tar") and is_file and not is_hidden(entry.name)


def _shards(path: Path, split: str, entries: Entries) -> list[Path]:
    """The tar files of a folder that belong to a split, which their names may tell."""
    found = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            entries.leave_out(entry.name, HIDDEN)
        elif entry.name.lower().endswith(COMPRESSED):
            raise UserError(f"source: got {shown(entry.name)} beside tar files, wanted plain tar files; unpack it")
        elif entry.is_dir() and (holds_images(path / entry.name, depth=2) or _holds_source(path / entry.name)):
            raise UserError(
                f"source: got {shown(path)}, which holds tar files and the folder {shown(entry.name)} with images, "
                "wanted the ones or the others; name the folder, or move the tar files to one of their own"
            )
        elif _is_tar(entry):
            found.append(Path(entry.path))
        else:
            entries.leave_out(entry.name, NO_DATA)
    return _of_split(found, split, entries)


def _told(file: Path, split: str) -> str | None:
    """The split that a file's name names, if any."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    found = {_meaning(word) for word in words if word in SPLITS or word == split.lower()}
    return found.pop() if len(found) == 1 else None


def _of_split(files: list[Path], split: str, entries: Entries) -> list[Path]:
    """The tar files whose names do not name another split."""
    if not split:
        return files
    told = {file: _told(file, split) for file in files}
    there = sorted({word for word in told.values() if word})
    mine = [file for file in files if told[file] == _meaning(split)]
    if not there and (split == DEFAULT_SPLIT or _meaning(files[0].absolute().parent.name) == _meaning(split)):
        return files
    untold = next((file for file in files if told[file] is None), None)
    if not mine or len(there) > 1 and untold:
        wanted = "one that is there" if not mine else "each tar file to tell its split beside those that do"
        raise UserError(
            f"source: got the split {split!r} of tar files {'of ' + ', '.join(there) if there else 'without splits'}"
            f"{f' and {shown(untold.name)}' if mine else ''}, wanted {wanted}; "
            f"{'name it by --split, or leave it out' if not mine else 'rename it, or move it away'}"
        )
    for file in files:
        if told[file] not in (None, _meaning(split)):
            entries.leave_out(file.name, OTHER_SPLIT)
    return [file for file in files if told[file] in (None, _meaning(split))]


def open_source(name: str, split: str = DEFAULT_SPLIT) -> Source:
    """Open the images of a path, or of `hub:NAME`.

    Raises:
        UserError: for a path that is not there, has no such split, holds no labelled images or entries that have no
            certain meaning.
    """
    path = Path(name)
    if name.startswith(HUB) or (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        source = HuggingFace(name, split)
    elif path.is_dir():
        source = _open_folder(path, split)
    elif path.is_file():
        source = TarFiles([path], Entries())
    else:
        raise UserError(f"source: got {shown(name)}, which is not there, wanted {KINDS}; correct the path")
    if not source.names:
        reasons = source.entries.left_out().items()
        left = [f"; {those['count']} entries are left out, {why}: {shown(those['names'][0])}" for why, those in reasons]
        left = "".join(left)
        raise UserError(f"source: got {shown(path)}, which holds no images{left}, wanted {KINDS}; name another folder")
    return source


def _has_tars(path: Path) -> bool:
    return any(map(_is_tar, os.scandir(path)))


def _open_folder(path: Path, split: str) -> Source:
    try:
        if (path / split).is_dir() or not _has_tars(path):
            path = _folder_of_split(path, split)
        if not _has_tars(path):
            return ClassFolders(path)
        entries = Entries()
        return TarFiles(_shards(path, split.rpartition("/")[2], entries), entries)
    except OSError as error:
        raise UserError(
            f"source: got {shown(path)}, which cannot be read ({reason(error)}), wanted {KINDS}; correct its rights"
        ) from None


def fingerprint(names: Iterable[str], labels: Iterable[int | str]) -> str:
    """SHA-256 of a list of names with labels, in order."""
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\t{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
