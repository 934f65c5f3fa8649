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


class Digits(Dataset):
    """scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey images of 10 classes, in [-1, 1]."""

    shape = (1, 8, 8)
    num_classes = 10
    classes = [str(i) for i in range(10)]

    def __init__(self):
        from sklearn.datasets import load_digits  # a second to import, needed here alone

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None]
        self.labels = torch.from_numpy(digits.target).long()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, flip: Tensor | None = None) -> Batch:
        """Read the samples of these indices, those in flip marked to be mirrored."""
        rows = torch.from_numpy(indices)
        return Batch(self.images[rows], None, self.labels[rows], flip)


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
    dataset = Digits() if data.name == "digits" else Latents(data.path, model.num_classes, data.pixels)
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
