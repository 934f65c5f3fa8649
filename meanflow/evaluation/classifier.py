"""Scores of small pictures, by a small classifier: Fréchet distance, accuracy, within-class variance; and grids."""

import hashlib
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..config import DataConfig
from ..data.dataset import Pictures, open_pictures
from ..data.images import grid, to_uint8
from ..draws import Draws, Purpose
from ..errors import UserError
from ..method.sampling import generate
from ..owner import owned
from ..startup import cache_folder
from .frechet import Moments, frechet_distance

CLASSIFIER_EPOCHS, CLASSIFIER_BATCH = {"digits": 20, "fashion": 3}, 64
# without noise and dropout the classifier memorises the digits, and its features generalise badly
CLASSIFIER_NOISE, CLASSIFIER_DROPOUT = {"digits": 0.2, "fashion": 0.05}, {"digits": 0.5, "fashion": 0.0}
FLOOR_DRAWS = 20
ROWS, CLASSES = 8, 10
PIXELS = 256_000
"""Pixels that a network or the classifier is given at a time: more do not fit a CPU's caches."""


def part_size(size: int) -> int:
    """Images of a height and width that are computed at a time."""
    return PIXELS // size**2


def within_class_variance(images: Tensor, labels: Tensor) -> float:
    """Mean over pixels and classes of the variance among the images (N, ...) of a class."""
    images = images.flatten(1).double()
    classes = labels.unique()
    return float(torch.stack([images[labels == c].var(0, correction=0).mean() for c in classes]).mean())


class Classifier(nn.Module):
    """A small convolutional network for grey pictures, 8 or 32 wide; its penultimate layer is the feature space."""

    def __init__(self, size: int, classes: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        strides = [2] * ((size // 8).bit_length() - 1) or [1]
        widths = [1, *[32] * len(strides)]
        self.stem = nn.ModuleList(nn.Conv2d(c, 32, 3, s, padding=1) for c, s in zip(widths, strides, strict=False))
        self.conv = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.out = nn.Linear(64, classes)

    def features(self, images: Tensor) -> Tensor:
        """images (N, 1, size, size) in [-1, 1] -> (N, 64)."""
        for conv in self.stem:
            images = conv(images).relu()
        x = functional.max_pool2d(self.conv(images).relu(), 2)
        return self.hidden(x.flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 1, size, size) -> logits (N, classes)."""
        return self.out(functional.dropout(self.features(images), self.dropout, self.training))


@dataclass(frozen=True)
class Scores:
    """Scores of a set of samples."""

    accuracy: float
    """Share of samples that the classifier puts into the class they were drawn for."""
    frechet: float
    """Fréchet distance to all real images, in the classifier's features."""
    variance_ratio: float
    """Within-class variance of the pixels over that of the real images."""

    def as_dict(self) -> dict[str, float]:
        """The scores by name."""
        return asdict(self)


class ClassifierJudge:
    """Scores pictures by a classifier trained here on the real ones; the same for the same seed.

    Args:
        data: digits or fashion. seed: of the classifier, and of the noise that a network is given.

    Raises:
        UserError: where the real pictures are missing or damaged.
    """

    def __init__(self, data: DataConfig, seed: int = 0):
        self.seed = seed
        split = open_pictures(data)
        self.real = split.real
        self.classifier = self._trained(data.name, split.learned)
        held_out = split.held_out
        self.accuracy_real = self._accuracy(self._features(held_out.images), held_out.labels)
        real_images = self.real.images
        self.real_features = self._features(real_images)
        self.real_gaussian = Moments.of(self.real_features).gaussian()
        self.real_variance = within_class_variance(real_images, self.real.labels)

    def _trained(self, name: str, learned: Pictures) -> Classifier:
        """The classifier of these pictures, from the user's cache folder, or trained and kept there."""
        epochs, noise, dropout = (x[name] for x in (CLASSIFIER_EPOCHS, CLASSIFIER_NOISE, CLASSIFIER_DROPOUT))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = Classifier(learned.shape[-1], learned.num_classes, dropout)
            kept = self._kept(f"{name} {epochs} {noise}", learned)
            if not _load(net, kept):
                with _alone(kept.parent):
                    # another process may have trained it in the meantime
                    if not _load(net, kept):
                        self._train(net, learned, epochs, noise)
                        _keep(net, kept)
        return net.eval().requires_grad_(False)

    def _kept(self, recipe: str, learned: Pictures) -> Path:
        """Where it is kept, by all that it depends on: this file too."""
        known = hashlib.sha256(f"{recipe} {self.seed} {torch.__version__}".encode() + Path(__file__).read_bytes())
        for part in (learned.pixels, learned.labels):
            known.update(part.numpy())
        return Path(cache_folder()) / "judges" / f"{recipe.split()[0]}-{known.hexdigest()[:16]}.safetensors"

    def _train(self, net: Classifier, learned: Pictures, epochs: int, noise: float) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        images, labels = learned.images, learned.labels
        for _ in tqdm(range(epochs), "the judge learns", unit="epoch", delay=1.0, leave=False):
            for part in torch.randperm(len(labels)).split(CLASSIFIER_BATCH):
                noisy = images[part] + noise * torch.randn_like(images[part])
                optimizer.zero_grad()
                functional.cross_entropy(net(noisy), labels[part]).backward()
                optimizer.step()

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(part_size(images.shape[-1]))])

    def _accuracy(self, features: Tensor, labels: Tensor) -> float:
        return float((self.classifier.out(features).argmax(1) == labels).double().mean())

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(Moments.of(features).gaussian(), self.real_gaussian)

    def floor(self) -> float:
        """Distance of as many real images drawn with replacement; mean of several drawings."""
        n = len(self.real)
        draws = (Draws(self.seed, i, torch.arange(n)).integers(Purpose.BOOTSTRAP, n) for i in range(FLOOR_DRAWS))
        distances = [self._distance(self.real_features[drawn]) for drawn in draws]
        return sum(distances) / len(distances)

    def class_means(self) -> float:
        """Distance of the classes' mean images, which one step of flow matching tends to."""
        images, labels = self.real.images, self.real.labels
        means = torch.stack([images[labels == c].mean(0) for c in range(self.real.num_classes)])
        return self._distance(self._features(means[labels]))

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor) -> Scores:
        """Score images (N, 1, size, size) in [-1, 1], drawn for labels (N,)."""
        images, labels = images.cpu().float().clamp(-1, 1), labels.cpu()
        features = self._features(images)
        return Scores(
            accuracy=self._accuracy(features, labels),
            frechet=self._distance(features),
            variance_ratio=within_class_variance(images, labels) / self.real_variance,
        )

    def score_net(self, net: nn.Module, device: torch.device, times=(1.0, 0.0), guidance=()) -> Scores:
        """Score a network by as many samples as there are real images to compare with, of the same classes."""
        labels, shape = self.real.labels, self.real.shape
        parts = [
            generate(net, Draws(self.seed, 1, part), shape, labels.to(device)[part], times, guidance)
            for part in torch.arange(len(labels), device=device).split(part_size(shape[-1]))
        ]
        return self.score(torch.cat(parts), labels)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block; where there is no folder to write to, all are at once."""
    with ExitStack() as stack:
        with suppress(UserError):
            stack.enter_context(owned(folder, patience=math.inf))
        yield


def _load(net: nn.Module, path: Path) -> bool:
    """Load weights; false where there are none yet, or half of them."""
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError):
        return False
    return True


def _keep(net: nn.Module, path: Path) -> None:
    """Write weights for the next time, whole or not at all; without a folder to write to they are not kept."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), partial)
        os.replace(partial, path)
    except OSError:
        pass


def spread(scores: list[dict], key: str) -> tuple[float, float]:
    """Mean and standard deviation of a score over the seeds."""
    values = [score[key] for score in scores]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def real_grid(judge: ClassifierJudge) -> Tensor:
    """Real pictures as a grid of samples, uint8."""
    columns = [torch.nonzero(judge.real.labels == c)[:ROWS, 0] for c in range(CLASSES)]
    return to_uint8(judge.real.images[torch.stack(columns, 1).flatten()])


def grid_of(
    net, seed: int, device: torch.device, times: Sequence[float] = (1.0, 0.0), guidance: Sequence[float] = ()
) -> Tensor:
    """Samples of a network, uint8, one column per class."""
    indices = torch.arange(ROWS * CLASSES, device=device)
    shape = (net.in_channels, net.input_size, net.input_size)
    return to_uint8(generate(net, Draws(seed, 0, indices), shape, indices % CLASSES, times, guidance)).cpu()


def draw_grids(all_axes, images: dict[str, Tensor]) -> None:
    """Draw each grid of uint8 pictures, one column per class, on axes of its own."""
    for axes, (title, pictures) in zip(all_axes, images.items(), strict=True):
        axes.imshow(grid(pictures, CLASSES).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title)
        size = pictures.shape[-1]
        axes.set_xticks([(size + 1) * c + (size + 1) / 2 for c in range(CLASSES)], range(CLASSES))
        axes.set_yticks([])
        axes.set_xlabel("class")
