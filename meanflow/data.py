"""Training data behind one interface: latents with their labels, in an order that is a function of the seed."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig, ModelConfig
from .draws import Draws, Stream
from .errors import UserError, require


class Batch(NamedTuple):
    """Some samples as they are stored, on the CPU."""

    mean: Tensor
    """(B, channels, size, size), fp32."""
    std: Tensor | None
    """The posterior's standard deviation, or None where there is none."""
    labels: Tensor
    """(B,) int64."""


class Dataset(Protocol):
    """What the trainer needs of data."""

    shape: tuple[int, int, int]
    """(channels, size, size) of a sample."""
    num_classes: int

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """The samples of these indices."""
        ...


class Digits:
    """scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey images of 10 classes, in [-1, 1]."""

    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self):
        from sklearn.datasets import load_digits  # a second to import, and nothing else here needs it

        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float().div(8).sub(1)[:, None]
        self.labels = torch.from_numpy(digits.target).long()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Batch:
        """The samples of these indices."""
        indices = torch.from_numpy(indices)
        return Batch(self.images[indices], None, self.labels[indices])


class Latents:
    """Cached posteriors of a VAE, memory-mapped: mean.npy and std.npy (N, channels, size, size), labels.npy (N,).

    Raises:
        UserError: for a missing or unreadable file, shapes that do not fit each other, or a label out of range.
    """

    def __init__(self, path: str, num_classes: int):
        require(path != "", "data.path", path, "a folder of latents", "name it by --data.path FOLDER")
        self.mean, self.std, labels = (self._open(Path(path) / f"{name}.npy") for name in ("mean", "std", "labels"))
        fits = self.mean.ndim == 4 and self.mean.shape == self.std.shape and labels.shape == self.mean.shape[:1]
        shapes = (self.mean.shape, self.std.shape, labels.shape)
        require(fits, path, shapes, "mean and std (N, C, S, S) and labels (N,)", "prepare the folder again")
        self.labels = torch.from_numpy(np.array(labels)).long()
        self.shape, self.num_classes = tuple(self.mean.shape[1:]), num_classes
        check_labels(self.labels, num_classes, f"{path}/labels.npy")

    @staticmethod
    def _open(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.path: got {path}, which cannot be read ({error}), wanted an .npy array; prepare the folder again"
            ) from None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> Batch:
        """The samples of these indices."""
        mean, std = (torch.from_numpy(a[indices]).float() for a in (self.mean, self.std))
        return Batch(mean, std, self.labels[torch.from_numpy(indices)])


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Raise where a label is not in 0 ... num_classes - 1."""
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    first = int(wrong[0]) if len(wrong) else None
    require(
        first is None, name, first, f"labels from 0 to {num_classes - 1}", "correct the labels or model.num_classes"
    )


def open_dataset(data: DataConfig, model: ModelConfig) -> Dataset:
    """The dataset of a run.

    Raises:
        UserError: where it does not fit the model.
    """
    dataset = Digits() if data.name == "digits" else Latents(data.path, model.num_classes)
    wanted = (model.in_channels, model.input_size, model.input_size)
    require(
        dataset.shape == wanted, "data", dataset.shape, f"samples of the model's shape {wanted}", "change the model"
    )
    require(
        dataset.num_classes == model.num_classes,
        "model.num_classes", model.num_classes, f"the data's {dataset.num_classes}", "change it",
    )  # fmt: skip
    return dataset


class Order:
    """Which samples a step reads: each epoch is a permutation by (seed, epoch)."""

    def __init__(self, length: int, batch: int, seed: int, drop_last: bool):
        require(batch <= length, "train.batch", batch, f"at most the {length} samples of the data", "lower it")
        self.length, self.batch, self.seed = length, batch, seed
        # without drop_last the epochs follow each other seamlessly
        self.epoch_length = length // batch * batch if drop_last else length
        self._permutations: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> float:
        """Epochs done before a step."""
        return step * self.batch / self.epoch_length

    def indices(self, step: int) -> np.ndarray:
        """The data's indices of the global batch of a step (batch,)."""
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, offsets = np.divmod(positions, self.epoch_length)
        wanted = set(epochs.tolist())
        self._permutations = {epoch: self._permutation(epoch) for epoch in wanted}
        return np.array([self._permutations[e][i] for e, i in zip(epochs.tolist(), offsets.tolist(), strict=True)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch in self._permutations:
            return self._permutations[epoch]
        return np.random.default_rng((self.seed, epoch)).permutation(self.length)


def draw_latents(batch: Batch, draws: Draws, config: DataConfig) -> Tensor:
    """What the network learns (B, channels, size, size): the posterior drawn, scaled and flipped as configured.

    The batch must be on the draws' device.
    """
    x = batch.mean
    if batch.std is not None:
        if config.sample_posterior:
            x = x + batch.std * draws.normal(Stream.POSTERIOR, tuple(x.shape[1:]))
        x = x * config.scale
    if config.flip:
        x = torch.where((draws.uniform(Stream.FLIP) < 0.5)[:, None, None, None], x.flip(-1), x)
    return x
