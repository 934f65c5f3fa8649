"""Scores of digits: Fréchet distance, conditional accuracy, within-class variance, by a small classifier."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..data.dataset import Digits
from ..draws import Draws, Purpose
from ..method.sampling import sample
from .frechet import Moments, frechet_distance

CLASSIFIER_EPOCHS, CLASSIFIER_BATCH = 20, 64
# without noise and dropout the classifier memorises the training images, and its features generalise badly
CLASSIFIER_NOISE, CLASSIFIER_DROPOUT = 0.2, 0.5
HELD_OUT = 5  # every fifth image
FLOOR_DRAWS = 20


def within_class_variance(images: Tensor, labels: Tensor) -> float:
    """Mean over pixels and classes of the variance among the images (N, ...) of a class."""
    images = images.flatten(1).double()
    classes = labels.unique()
    return float(torch.stack([images[labels == c].var(0, correction=0).mean() for c in classes]).mean())


class DigitClassifier(nn.Module):
    """A small convolutional network for 8x8 digits; its penultimate layer is the feature space."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """images (N, 1, 8, 8) in [-1, 1] -> (N, 64)."""
        x = functional.max_pool2d(self.conv2(self.conv1(images).relu()).relu(), 2)
        return self.hidden(x.flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """images (N, 1, 8, 8) -> logits (N, 10)."""
        return self.out(functional.dropout(self.features(images), CLASSIFIER_DROPOUT, self.training))


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


class DigitsEvaluation:
    """Scores 8x8 digits by a classifier trained here on the real ones; the same for the same seed."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.digits = Digits()
        self.classifier, self.accuracy_real = self._train_classifier()
        self.real_features = self._features(self.digits.images)
        self.real_gaussian = Moments.of(self.real_features).gaussian()
        self.real_variance = within_class_variance(self.digits.images, self.digits.labels)

    def _train_classifier(self) -> tuple[DigitClassifier, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = DigitClassifier()
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
            held_out = torch.arange(len(self.digits)) % HELD_OUT == 0
            images, labels = self.digits.images[~held_out], self.digits.labels[~held_out]
            for _ in tqdm(range(CLASSIFIER_EPOCHS), "the judge learns", unit="epoch", delay=1.0, leave=False):
                for part in torch.randperm(len(labels)).split(CLASSIFIER_BATCH):
                    noisy = images[part] + CLASSIFIER_NOISE * torch.randn_like(images[part])
                    optimizer.zero_grad()
                    functional.cross_entropy(net(noisy), labels[part]).backward()
                    optimizer.step()
        net.eval().requires_grad_(False)
        correct = net(self.digits.images[held_out]).argmax(1) == self.digits.labels[held_out]
        return net, float(correct.double().mean())

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)

    def _distance(self, features: Tensor) -> float:
        return frechet_distance(Moments.of(features).gaussian(), self.real_gaussian)

    def floor(self) -> float:
        """Distance of as many real images drawn with replacement; mean of several drawings."""
        n = len(self.digits)
        draws = (Draws(self.seed, i, torch.arange(n)).integers(Purpose.BOOTSTRAP, n) for i in range(FLOOR_DRAWS))
        distances = [self._distance(self.real_features[drawn]) for drawn in draws]
        return sum(distances) / len(distances)

    def class_means(self) -> float:
        """Distance of the classes' mean images, which one step of flow matching tends to."""
        means = torch.stack([self.digits.images[self.digits.labels == c].mean(0) for c in range(10)])
        return self._distance(self._features(means[self.digits.labels]))

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor) -> Scores:
        """Score images (N, 1, 8, 8) in [-1, 1], drawn for labels (N,)."""
        images, labels = images.cpu().float().clamp(-1, 1), labels.cpu()
        return Scores(
            accuracy=float((self.classifier(images).argmax(1) == labels).double().mean()),
            frechet=self._distance(self._features(images)),
            variance_ratio=within_class_variance(images, labels) / self.real_variance,
        )

    def score_net(self, net: nn.Module, device: torch.device, times=(1.0, 0.0), guidance=()) -> Scores:
        """Score a network by as many samples as there are real images, of the same classes."""
        draws = Draws(self.seed, 1, torch.arange(len(self.digits), device=device))
        labels = self.digits.labels.to(device)
        noise = draws.normal(Purpose.NOISE, self.digits.shape)
        return self.score(sample(net, noise, labels, times, guidance), labels)
