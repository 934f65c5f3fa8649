"""Import existing latents into a cache: what is stored is copied, nothing is encoded anew.

official   a folder of 00000000.pt, 00000001.pt ..., as MeanFlow's JAX code prepares them (Gsunshine/meanflow, file
           utils/data_util.py): each a dict of "image" (2C, S, S) fp32, the posterior's mean and then its std, and
           "label" (); encoded of ADM's centre crops in [-1, 1] by FlaxAutoencoderKL sd-vae-ft-mse.
repa       a zip or folder of 00000/img-mean-std-00000000.npy ... (2C, S, S) fp32, mean and then std, with the labels in
           dataset.json as {"labels": [[file, label], ...]} (sihyun-yu/REPA, preprocessing/encoders.py); of ADM's centre
           crops in [-1, 1].
edm2       the same files (NVlabs/edm2, training/encoders.py and dataset_tool.py), but of images in [0, 1]: nothing in
           the files tells, so it has to be said, and training takes --data.pixels unit.
arrays     a folder of mean.npy, std.npy (N, C, S, S) and labels.npy (N,).

All are unscaled. One check serves all layouts: log-variances, drawn or scaled latents without a std, what is no finite
floating-point number, and labels that are no whole numbers from 0 on are refused, as are labels without a file and
files without a label. bf16, whole floats and one-hot vectors as labels are converted, and the manifest's "converted"
says so.
"""

import io
import json
import math
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UserError, require
from ..world import World
from .cache import DTYPES, Builder
from .entries import HIDDEN, NO_DATA, Entries, check_size, is_hidden, read_file, reason, shown, walk
from .labels import Label, read_label
from .preparation import AHEAD, batches_of, fill, in_order, progress, threads
from .sources import fingerprint

BATCH = 64  # rows read at a time
LARGEST = 2**24  # numbers of a latent
LABELS = "dataset.json"


class Stored(NamedTuple):
    """An image's entry in a layout's files, unchecked."""

    moments: object
    """Mean and then std (2C, S, S)."""
    label: object


class Latent(NamedTuple):
    """An image's entry for a cache."""

    moments: np.ndarray
    """Mean and std (2, C, S, S)."""
    label: int
    converted: tuple[str, ...]
    """What was converted, because its meaning was certain."""


HEADERS = threading.Lock()
"""Numpy evaluates an array's header as Python, whose parser may fail when threads use it at once (CPython 3.11)."""


class Layout(Protocol):
    """Latents in somebody's files."""

    names: list[str]
    pixels: str
    """"symmetric" for latents of images in [-1, 1], "unit" for [0, 1]."""
    entries: Entries
    """The account of used and left-out files."""

    def read(self, index: int) -> Stored:
        """Read an image's entry, in any of several threads. Raises whatever the file's reader raises."""
        ...


def read_latent(layout: Layout, index: int) -> Latent:
    """Read an image's latent and label, with the same checks for every layout.

    Raises:
        UserError: for what cannot be read, or is not a mean, a standard deviation and a label.
    """
    name = shown(layout.names[index])
    try:
        stored = layout.read(index)
    except UserError:
        raise
    except Exception as error:  # torch and numpy raise half a dozen kinds for damaged files
        raise UserError(
            f"source: got {name}, which cannot be read ({reason(error)}), wanted latents; restore the file"
        ) from None
    moments, bent = _moments(stored.moments, name)
    label = _read_label(stored.label, name)
    return Latent(moments, label.value, tuple(filter(None, (bent, label.converted))))


def _moments(stored: object, name: str) -> tuple[np.ndarray, str | None]:
    """Check mean and std and reshape them, (2C, S, S) -> (2, C, S, S); returns what was converted, too."""
    converted, fits = None, isinstance(stored, np.ndarray) and stored.dtype.kind == "f"
    if isinstance(stored, torch.Tensor):
        fits = stored.is_floating_point() and stored.layout == torch.strided and not stored.is_meta
    if not fits:
        got = f"{type(stored).__name__} {getattr(stored, 'dtype', '')}".strip()
        raise UserError(f"source: got {name}, {got}, wanted floating-point numbers in the memory; prepare it again")
    shape = tuple(stored.shape)
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or not 0 < math.prod(shape) <= LARGEST:
        raise UserError(
            f"source: got {name} of shape {shape}, wanted mean and std (2C, S, S); means alone lack the posterior: "
            "encode the images anew"
        )
    if isinstance(stored, torch.Tensor):
        stored = stored.detach()
        if stored.dtype not in (torch.float16, torch.float32, torch.float64):
            stored, converted = stored.float(), f"latents stored in {stored.dtype}".replace("torch.", "")
        stored = stored.numpy()
    if not np.isfinite(stored).all():
        raise UserError(f"source: got {name}, which is not finite, wanted numbers; prepare it again")
    moments = stored.reshape(2, -1, *stored.shape[1:])
    if not (moments[1] >= 0).all():
        raise UserError(
            f"source: got {name} with standard deviations down to {moments[1].min():.3g}, wanted mean and std, "
            "unscaled; log-variances, means alone and drawn latents are something else: encode the images anew"
        )
    return moments, converted


def _plain(label: object) -> object:
    """Convert a label's tensor to an array."""
    if not isinstance(label, torch.Tensor):
        return label
    return (label.detach().float() if label.is_floating_point() else label.detach()).numpy()


def _check_labels(entries: Entries, names: Iterable[str], labels: Iterable[object]) -> int:
    """Count the good labels and refuse the others, before anything is copied."""
    good = 0
    for name, label in zip(names, labels, strict=True):
        try:
            _read_label(label, shown(name))
            good += 1
        except UserError as error:
            entries.refuse(str(error))
    return good


def _read_label(label: object, name: str) -> Label:
    return read_label(label, f"the label of {name}", "label the image, or leave it out")


class Official:
    """A folder with one .pt file per image."""

    pixels = "symmetric"

    def __init__(self, path: Path):
        self.path, self.entries, self.names = path, Entries(), []
        require(path.is_dir(), "source", shown(path), "a folder of .pt files", "name another")
        for name in sorted(walk(path, "", self.entries, ".pt")):
            if "/" in name:
                wanted = "wanted all .pt files in one; name that folder"
                self.entries.refuse(f"source: got {shown(name)} in a folder of its own, {wanted}")
            else:
                self.names.append(name)
        self.entries.close(len(self.names))

    def read(self, index: int) -> Stored:
        path = self.path / self.names[index]
        check_size(path.stat().st_size)
        sample = torch.load(path, map_location="cpu", weights_only=True)
        fits = isinstance(sample, dict) and {"image", "label"} <= sample.keys()
        got = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
        require(fits, shown(path), got, "a dict of image (2C, S, S) and label", "is it the official layout?")
        return Stored(sample["image"], _plain(sample["label"]))


class Archive:
    """A zip or folder of .npy files with dataset.json."""

    def __init__(self, path: Path, pixels: str):
        self.path, self.pixels = path, pixels
        try:
            self.zip = None if path.is_dir() else zipfile.ZipFile(path)
            pairs = json.loads(self._bytes(LABELS))["labels"]
            self.labels = {str(name): label for name, label in pairs}
        except Exception as error:  # from the zip file, JSON or its contents
            raise UserError(
                f"source: got {shown(path)}, whose labels cannot be read ({reason(error)}), wanted a zip or folder of "
                f'.npy files with {LABELS} as {{"labels": [[file, label], ...]}}; prepare it with labels'
            ) from None
        self.names = sorted(self.labels)
        self._account(len(pairs))

    def _account(self, listed: int) -> None:
        """Match files and labels; either without the other is refused."""
        self.entries = Entries()
        if self.zip is None:
            files = set(walk(self.path, "", self.entries, (".npy", LABELS)))
        else:
            files = {info.filename for info in self.zip.infolist() if not info.is_dir()}
            for name in sorted(files):
                if is_hidden(name) or not name.lower().endswith((".npy", LABELS)):
                    self.entries.leave_out(name, HIDDEN if is_hidden(name) else NO_DATA)
                    files.remove(name)
        files.discard(LABELS)
        where = shown(self.path)
        for name in sorted(files - self.labels.keys()):
            got = f"{shown(name)} of {where} without a label in {LABELS}"
            self.entries.refuse(f"source: got {got}, wanted a label for each file; add it, or remove the file")
        for name in sorted(self.labels.keys() - files):
            got = f"{shown(name)} in {LABELS} of {where}, which is not there"
            self.entries.refuse(f"source: got {got}, wanted a file for each label; restore it, or remove its label")
        if listed > len(self.labels):
            got = f"source: got {listed} labels of {len(self.labels)} files in {LABELS} of {where}"
            self.entries.refuse(f"{got}, wanted one for each; remove the others", listed - len(self.labels))
        present = [name for name in self.names if name in files]
        good = _check_labels(self.entries, present, [self.labels[name] for name in present])
        self.entries.close(good)

    def _bytes(self, name: str) -> bytes:
        if self.zip is None:
            return read_file(self.path / name)
        check_size(self.zip.getinfo(name).file_size)
        return self.zip.read(name)

    def read(self, index: int) -> Stored:
        name = self.names[index]
        data = io.BytesIO(self._bytes(name))
        with HEADERS:
            return Stored(np.load(data, allow_pickle=False), self.labels[name])


class Arrays:
    """A folder with mean.npy, std.npy and labels.npy."""

    pixels = "symmetric"

    def __init__(self, path: Path):
        self.mean, self.std, self.labels = (self._open(path / f"{name}.npy") for name in ("mean", "std", "labels"))
        shapes = (self.mean.shape, self.std.shape, self.labels.shape)
        fits = self.mean.ndim == 4 and shapes[0] == shapes[1] and shapes[2][:1] == shapes[0][:1]
        require(fits, shown(path), shapes, "mean and std (N, C, S, S) and labels (N,)", "prepare the folder again")
        types = self.mean.dtype.kind + self.std.dtype.kind
        got = f"mean {self.mean.dtype}, std {self.std.dtype}"
        require(types == "ff", shown(path), got, "floating-point numbers", "prepare the folder again")
        self.names, self.entries = [f"row {i}" for i in range(len(self.labels))], Entries()
        self.entries.close(_check_labels(self.entries, self.names, self.labels))

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # the file is no array, or no whole one
            raise UserError(
                f"source: got {shown(path)}, which cannot be read ({reason(error)}), wanted an array; restore it"
            ) from None
        require(isinstance(array, np.ndarray), shown(path), type(array).__name__, "one array", "save it by numpy.save")
        return array

    def read(self, index: int) -> Stored:
        return Stored(np.concatenate([self.mean[index], self.std[index]]), self.labels[index])


LAYOUTS = {
    "official": Official,
    "repa": lambda path: Archive(path, "symmetric"),
    "edm2": lambda path: Archive(path, "unit"),
    "arrays": Arrays,
}


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import."""

    layout: Literal["official", "repa", "edm2", "arrays"]
    """Layout of the files: the official .pt folder, REPA's or EDM2's zip or folder, mean/std/labels.npy."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The autoencoder that made the latents, for the manifest: the files do not name it."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Dtype of the stored mean and std."""
    workers: int = 4
    """Reading threads per process."""
    shard_rows: int = 8192
    """Rows per shard, which is also the most that a killed process must repeat."""
    repair: bool = False
    """Read the existing shards too and write damaged ones again; missing ones are always written."""

    def __post_init__(self):
        for name in ("workers", "shard_rows"):
            value = getattr(self, name)
            require(value >= 1, name, value, "a positive whole number", "change it")


def import_latents(source: Path, folder: Path, options: ImportOptions) -> dict | None:
    """Copy latents into a cache, resuming what it holds; returns the manifest, in the first process.

    Raises:
        UserError: for files that are not there or of another layout, or lack the standard deviation.
    """
    require(source.exists(), "source", str(source), "a folder or file that exists", "correct it")
    layout: Layout = LAYOUTS[options.layout](source)
    if not layout.names:
        raise UserError(f"source: got {source}, which holds no latents, wanted {options.layout} files; correct it")
    first = read_latent(layout, 0)
    job = {
        "source": {"kind": options.layout, "path": str(source), "sha256": fingerprint(layout.names, layout.names)},
        "count": len(layout.names),
        "classes": None,
        "vae": {"name": options.vae, "sha256": None},
        "crop": None,
        "pixels": layout.pixels,
        "latent_shape": first.moments.shape[1:],
        "dtype": options.dtype,
        "flipped": False,
        "shard_rows": options.shard_rows,
    }

    def make(builder: Builder, shards: list[int]) -> None:
        with threads(options.workers) as pool, progress(builder, shards, world) as bar:
            read = in_order(pool, partial(read_latent, layout), batches_of(builder, shards, BATCH), AHEAD)
            for shard in shards:
                _copy_shard(builder, shard, layout, read, bar)

    with World("cpu") as world:
        return fill(folder, job, world, options.repair, make, layout.entries.left_out())


def _copy_shard(builder: Builder, shard: int, layout: Layout, read: Iterator[list], bar: tqdm) -> None:
    members, shape, dtype = builder.members(shard), tuple(builder.job["latent_shape"]), builder.job["dtype"]
    latents = np.empty((len(members), 1, 2, *shape), DTYPES[dtype])
    labels, converted = np.empty(len(members), np.int64), Counter()
    for start in range(0, len(members), BATCH):
        for i, latent in enumerate(next(read), start):
            name, found = shown(layout.names[members[i]]), latent.moments.shape[1:]
            if found != shape:
                raise UserError(f"source: got {name} of {found}, wanted {shape} as the first; remove it")
            with np.errstate(over="ignore"):
                latents[i, 0], labels[i] = latent.moments, latent.label
            converted.update(latent.converted)
            if not np.isfinite(latents[i]).all():
                raise UserError(f"source: got {name}, not finite in {dtype}, wanted numbers; repair it, or take fp32")
        bar.update(len(members[start : start + BATCH]))
    builder.put(shard, latents, labels, [], converted)
