"""Training data behind one interface: latents with their labels, in an order that is a function of the seed.

The position in the data is the step: each process reads its share of Order.indices(step), so a run resumes exactly, on
any number of processes.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig, ModelConfig
from ..errors import require
from .cache import Cache
from .images import read_idx


class Batch(NamedTuple):
    """Samples as they are stored, on the CPU."""

    mean: Tensor
    """(B, channels, size, size), fp16 or fp32 as they are stored; draw_latents computes in fp32."""
    std: Tensor | None
    """The posterior's standard deviation, or None if there is none."""
    labels: Tensor
    """(B,) int64."""
    flip: Tensor | None = None
    """The samples still to be mirrored, (B,) bool, or None."""


class Dataset(Protocol):
    """The data that a trainer needs."""

    shape: tuple[int, int, int]
    """(channels, size, size) of a sample."""
    num_classes: int
    classes: list[str] | None
    """Names of the classes, if the data has them."""

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray, flip: Tensor | None = None) -> Batch:
        """Read the samples of these indices; those in flip (B,) bool are mirrored, or marked to be."""
        ...


class Pictures(Dataset):
    """Small grey images, kept in memory, whose pixels themselves are trained on.

    Args:
        pixels: (N, size, size) uint8, from 0 to white.
        labels: (N,) whole numbers.
        classes: their names.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, white: int, classes: list[str]):
        self.pixels, self.labels = torch.tensor(pixels)[:, None], torch.tensor(labels).long()
        self.white, self.classes, self.num_classes = white, classes, len(classes)
        self.shape = (1, *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All images (N, 1, size, size) fp32 in [-1, 1]."""
        return self._scaled(self.pixels)

    def read(self, indices: np.ndarray, flip: Tensor | None = None) -> Batch:
        """Read the samples of these indices, those in flip marked to be mirrored."""
        rows = torch.from_numpy(indices)
        return Batch(self._scaled(self.pixels[rows]), None, self.labels[rows], flip)

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.float().div(self.white / 2).sub(1)


class Split(NamedTuple):
    """Pictures as a run and the judge of its samples use them."""

    train: Pictures
    """What networks are trained on."""
    real: Pictures
    """What their samples are compared with."""
    learned: Pictures
    """What the judge's classifier learns from."""
    held_out: Pictures
    """What its accuracy is measured on."""


def split_digits() -> Split:
    """scikit-learn's bundled handwritten digits: 1,797 real 8x8 images; a judge's classifier lacks every fifth."""
    from sklearn.datasets import load_digits  # a second to import, needed here alone

    digits = load_digits()
    pixels, labels, held_out = digits.images.astype(np.uint8), digits.target, np.arange(len(digits.target)) % 5 == 0

    def part(rows) -> Pictures:
        return Pictures(pixels[rows], labels[rows], white=16, classes=[str(i) for i in range(10)])

    return Split(everything := part(slice(None)), everything, part(~held_out), part(held_out))


FASHION = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist has it."""
FASHION_CLASSES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split() + ["Ankle boot"]
FASHION_SIZE, PADDING = 28, 2


def split_fashion(folder: Path) -> Split:
    """Fashion-MNIST (arXiv 1708.07747), 28x28 with a border of black to be 32x32: 60,000 images to learn from, and
    10,000 that neither a network nor the judge's classifier sees, to compare with.

    Args:
        folder: of the four idx files as they are published, each packed by gzip or not.

    Raises:
        UserError: for a file that is missing, damaged, or does not go with the others.
    """
    learned, held_out = (_fashion_part(folder, part) for part in ("train", "t10k"))
    return Split(learned, held_out, learned, held_out)


def _fashion_part(folder: Path, part: str) -> Pictures:
    paths = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        wanted = f"a folder of Fashion-MNIST's four idx files: this one has no {name} or {name}.gz"
        hint = f"apt-get install dataset-fashion-mnist makes {FASHION}, github.com/zalandoresearch/fashion-mnist has "
        require(bool(found), "data.path", str(folder), wanted, hint + "them too; name theirs by --data.path FOLDER")
        paths += found[:1]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    hint = "take both files from one place"
    size = (FASHION_SIZE, FASHION_SIZE)
    require(images.shape[1:] == size, f"{paths[0]}: size", images.shape[1:], f"images of {size}", hint)
    count = len(images)
    require(count > 0, f"{paths[0]}: images", count, "one or more", hint)
    require(len(labels) == count, f"{paths[1]}: labels", len(labels), f"{count}, one for each image", hint)
    check_labels(torch.tensor(labels), len(FASHION_CLASSES), f"{paths[1]}: labels")
    border = ((0, 0), (PADDING, PADDING), (PADDING, PADDING))
    return Pictures(np.pad(images, border), labels, white=255, classes=FASHION_CLASSES)


def open_pictures(data: DataConfig) -> Split:
    """Open the pictures of a run.

    Raises:
        UserError: where they are missing or damaged.
    """
    return split_digits() if data.name == "digits" else split_fashion(Path(data.path or FASHION))


class Latents(Dataset):
    """Cached posteriors of a VAE, memory-mapped.

    Args:
        path: folder that scripts/prepare_data.py wrote.
        num_classes: of the model, for a folder that does not know the names of its classes.
        pixels: the range of the images that the run expects.

    Raises:
        UserError: for a missing or damaged cache, a label out of range, or other pixels.
    """

    def __init__(self, path: str, num_classes: int, pixels: str = "symmetric"):
        require(path != "", "data.path", path, "a folder of latents", "name it by --data.path FOLDER")
        self.cache = Cache(Path(path))
        found, classes = self.cache.manifest["pixels"], self.cache.manifest["classes"]
        require(found == pixels, "data.pixels", pixels, f"{found!r}, the latents'", f"set --data.pixels {found}")
        self.labels = torch.from_numpy(self.cache.labels)
        self.shape, self.classes = self.cache.shape, classes
        self.num_classes = len(classes) if classes else num_classes
        check_labels(self.labels, self.num_classes, f"{path}: labels")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, flip: Tensor | None = None) -> Batch:
        """Read the samples of these indices; those in flip are read mirrored if the cache has them so, else marked."""
        stored = flip is not None and self.cache.flipped
        mean, std = map(torch.from_numpy, self.cache.posterior(indices, flip.numpy() if stored else None))
        return Batch(mean, std, self.labels[torch.from_numpy(indices)], None if stored else flip)


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise if a label is not in 0 ... num_classes - 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    first = int(wrong[0]) if len(wrong) else None
    require(
        first is None, name, first, f"labels from 0 to {num_classes - 1}", "correct the labels or model.num_classes"
    )


def open_dataset(data: DataConfig, model: ModelConfig) -> Dataset:
    """Open the dataset of a run.

    Raises:
        UserError: if it does not fit the model.
    """
    if data.in_pixels:
        dataset = open_pictures(data).train
    else:
        dataset = Latents(data.path, model.num_classes, data.pixels)
    wanted = (model.in_channels, model.input_size, model.input_size)
    shape, classes = dataset.shape, dataset.num_classes
    require(shape == wanted, "data", shape, f"samples of the model's shape {wanted}", "change the model")
    got = model.num_classes
    require(classes == got, "model.num_classes", got, f"the data's {classes}", "change it")
    return dataset


class Order:
    """The order of the data: each epoch is a permutation by (seed, epoch)."""

    def __init__(self, length: int, batch: int, seed: int, drop_last: bool):
        require(batch <= length, "train.batch", batch, f"at most the {length} samples of the data", "lower it")
        self.length, self.batch, self.seed = length, batch, seed
        # without drop_last a batch may span two epochs
        self.epoch_length = length // batch * batch if drop_last else length
        self._permutations: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> float:
        """Number of epochs before a step."""
        return step * self.batch / self.epoch_length

    def indices(self, step: int) -> np.ndarray:
        """The data's indices of the global batch of a step (batch,)."""
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, offsets = np.divmod(positions, self.epoch_length)
        first, last = int(epochs[0]), int(epochs[-1])
        # tens of milliseconds for ImageNet, once an epoch
        known = self._permutations
        wanted = {e: known[e] if e in known else self._permutation(e) for e in range(first, last + 1)}
        self._permutations = wanted
        return np.concatenate([permutation[offsets[epochs == e]] for e, permutation in wanted.items()])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)
