"""Latents that people already have, as a cache: what is stored is copied, nothing is encoded anew.

official   a folder of 00000000.pt, 00000001.pt ..., as MeanFlow's JAX code prepares them (Gsunshine/meanflow, file
           utils/data_util.py): each a dict of "image" (2C, S, S) fp32, the posterior's mean and then its std, and
           "label" (); encoded of ADM's centre crops in [-1, 1] by FlaxAutoencoderKL sd-vae-ft-mse.
repa       a zip or folder of 00000/img-mean-std-00000000.npy ... (2C, S, S) fp32, mean and then std, with the labels in
           dataset.json as {"labels": [[file, label], ...]} (sihyun-yu/REPA, preprocessing/encoders.py); of ADM's centre
           crops in [-1, 1].
edm2       the same files (NVlabs/edm2, training/encoders.py and dataset_tool.py), but of images in [0, 1]: nothing in
           the files tells, so it has to be said, and training takes --data.pixels unit.
arrays     a folder of mean.npy, std.npy (N, C, S, S) and labels.npy (N,).

All are unscaled. A file of log-variances, or of drawn or scaled latents without a std, is refused.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from .cache import DTYPES, Builder
from .errors import UserError, require
from .preparation import AHEAD, batches_of, fill, in_order, progress, threads
from .sources import fingerprint
from .world import World

BATCH = 64  # rows read at a time


class Layout(Protocol):
    """Latents in somebody's files."""

    names: list[str]
    pixels: str
    """"symmetric" for latents of images in [-1, 1], "unit" for [0, 1]."""

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Mean and std (2, C, S, S) and the label of an image. Called from several threads."""
        ...


def _moments(array: np.ndarray, name: str) -> np.ndarray:
    """(2C, S, S) -> (2, C, S, S), checked."""
    if array.ndim != 3 or array.shape[0] % 2 or array.shape[1] != array.shape[2]:
        raise UserError(
            f"source: got {name} of shape {array.shape}, wanted mean and std (2C, S, S); means alone lack the "
            "posterior: encode the images anew"
        )
    moments = array.reshape(2, -1, *array.shape[1:])
    if not (moments[1] >= 0).all():
        raise UserError(
            f"source: got {name} with standard deviations down to {moments[1].min():.3g}, wanted mean and std, "
            "unscaled; log-variances, means alone and drawn latents are something else: encode the images anew"
        )
    return moments


class Official:
    """One .pt file an image."""

    pixels = "symmetric"

    def __init__(self, path: Path):
        self.path = path
        self.names = sorted(file.name for file in path.glob("*.pt"))

    def read(self, index: int) -> tuple[np.ndarray, int]:
        path = self.path / self.names[index]
        try:
            sample = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            reason = " ".join(str(error).split()[:20])
            raise UserError(
                f"source: got {path}, which cannot be read ({reason}), wanted tensors; restore the file"
            ) from None
        fits = isinstance(sample, dict) and {"image", "label"} <= sample.keys()
        got = sorted(map(str, sample)) if isinstance(sample, dict) else type(sample).__name__
        require(fits, str(path), got, "a dict of image (2C, S, S) and label", "is it the official layout?")
        return _moments(sample["image"].numpy(), str(path)), int(sample["label"])


class Archive:
    """A zip or folder of .npy files with dataset.json."""

    def __init__(self, path: Path, pixels: str):
        self.path, self.pixels = path, pixels
        try:
            self.zip = None if path.is_dir() else zipfile.ZipFile(path)
            labels = json.loads(self._bytes("dataset.json"))["labels"]
            self.names, self.labels = zip(*sorted((str(name), int(label)) for name, label in labels), strict=True)
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"source: got {path}, whose labels cannot be read ({error!r}), wanted a zip or folder of .npy files "
                'with dataset.json as {"labels": [[file, label], ...]}; prepare it with labels'
            ) from None

    def _bytes(self, name: str) -> bytes:
        return (self.path / name).read_bytes() if self.zip is None else self.zip.read(name)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        name = self.names[index]
        try:
            array = np.load(io.BytesIO(self._bytes(name)), allow_pickle=False)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"source: got {name} of {self.path}, which cannot be read ({error}), wanted an array; restore it"
            ) from None
        return _moments(array, name), self.labels[index]


class Arrays:
    """mean.npy, std.npy and labels.npy."""

    pixels = "symmetric"

    def __init__(self, path: Path):
        self.mean, self.std, self.labels = (self._open(path / f"{name}.npy") for name in ("mean", "std", "labels"))
        shapes = (self.mean.shape, self.std.shape, self.labels.shape)
        fits = self.mean.ndim == 4 and self.mean.shape == self.std.shape and self.labels.shape == self.mean.shape[:1]
        require(fits, str(path), shapes, "mean and std (N, C, S, S) and labels (N,)", "prepare the folder again")
        self.names = [f"row {i}" for i in range(len(self.labels))]

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"source: got {path}, which cannot be read ({error}), wanted an array; restore it"
            ) from None

    def read(self, index: int) -> tuple[np.ndarray, int]:
        return np.stack([self.mean[index], self.std[index]]), int(self.labels[index])


LAYOUTS = {
    "official": Official,
    "repa": lambda path: Archive(path, "symmetric"),
    "edm2": lambda path: Archive(path, "unit"),
    "arrays": Arrays,
}


@dataclass(frozen=True)
class ImportOptions:
    """How latents are taken over."""

    layout: Literal["official", "repa", "edm2", "arrays"]
    """Whose files they are: the official .pt folder, REPA's or EDM2's zip or folder, mean/std/labels.npy."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """The autoencoder they are of, for the manifest: the files do not say."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """What mean and std are stored in."""
    workers: int = 4
    """Threads of each process that read."""
    shard_rows: int = 8192
    """Rows a shard: what a killed process does again at most."""
    repair: bool = False
    """Read the shards that are there too, and do the damaged ones again; missing ones are always done."""

    def __post_init__(self):
        for name in ("workers", "shard_rows"):
            value = getattr(self, name)
            require(value >= 1, name, value, "a positive whole number", "change it")


def import_latents(source: Path, folder: Path, options: ImportOptions) -> dict | None:
    """Copy somebody's latents into a cache, going on with what it holds; the manifest, in the first process.

    Raises:
        UserError: for files that are not there or of another layout, or lack the standard deviation.
    """
    require(source.exists(), "source", str(source), "a folder or file that exists", "correct it")
    layout: Layout = LAYOUTS[options.layout](source)
    if not layout.names:
        raise UserError(f"source: got {source}, which holds no latents, wanted {options.layout} files; correct it")
    first, _ = layout.read(0)
    job = {
        "source": {"kind": options.layout, "path": str(source), "sha256": fingerprint(layout.names, layout.names)},
        "count": len(layout.names),
        "classes": None,
        "vae": {"name": options.vae, "sha256": None},
        "crop": None,
        "pixels": layout.pixels,
        "latent_shape": first.shape[1:],
        "dtype": options.dtype,
        "flipped": False,
        "shard_rows": options.shard_rows,
    }

    def make(builder: Builder, shards: list[int]) -> None:
        with threads(options.workers) as pool, progress(builder, shards, world) as bar:
            read = in_order(pool, layout.read, batches_of(builder, shards, BATCH), AHEAD)
            for shard in shards:
                _copy_shard(builder, shard, layout, read, bar)

    with World("cpu") as world:
        return fill(folder, job, world, options.repair, make)


def _copy_shard(builder: Builder, shard: int, layout: Layout, read: Iterator[list], bar: tqdm) -> None:
    members, shape, dtype = builder.members(shard), tuple(builder.job["latent_shape"]), builder.job["dtype"]
    latents = np.empty((len(members), 1, 2, *shape), DTYPES[dtype])
    labels = np.empty(len(members), np.int64)
    for start in range(0, len(members), BATCH):
        for i, (moments, label) in enumerate(next(read), start):
            name = layout.names[members[i]]
            if moments.shape[1:] != shape:
                raise UserError(f"source: got {name} of {moments.shape[1:]}, wanted {shape} as the first; remove it")
            with np.errstate(over="ignore"):
                latents[i, 0], labels[i] = moments, label
            if not np.isfinite(latents[i]).all():
                raise UserError(f"source: got {name}, not finite in {dtype}, wanted numbers; repair it, or take fp32")
        bar.update(len(members[start : start + BATCH]))
    builder.put(shard, latents, labels, [], {})
