"""Scores of features, each with its standard error due to the finite number of samples."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from ..errors import require
from .frechet import Gaussian, Moments, frechet_distance, merge

BLOCKS = 10
"""Number of blocks of samples, by index, whose differences give the standard errors."""
STUDENT = 2.262
"""Half width of a 95 % interval in standard errors, for ten blocks (nine degrees of freedom)."""
SPLIT = 5000
"""Samples per split of the Inception Score; the mean over the splits is reported (ADM)."""
SHUFFLE_SEED = 2020
"""torch-fidelity's seed of the permutation before the Inception Score's splits."""
NEIGHBOURS = 3
"""Neighbour whose distance is the radius of precision and recall (ADM)."""
ROWS = 2048


@dataclass(frozen=True)
class Estimate:
    """A score, and its standard error over sets of as many samples."""

    value: float
    stderr: float | None = None

    def as_dict(self) -> dict:
        """Value, standard error and 95 % interval, for JSON."""
        if self.stderr is None:
            return {"value": self.value, "stderr": None, "interval": None}
        half = STUDENT * self.stderr
        return {"value": self.value, "stderr": self.stderr, "interval": [self.value - half, self.value + half]}


def blocks(x: Tensor) -> list[Tensor]:
    """Cut (N, ...) into BLOCKS parts, in order, of sizes that differ by one at most.

    Raises:
        UserError: for fewer samples than two a block.
    """
    require(len(x) >= 2 * BLOCKS, "count", len(x), f"at least {2 * BLOCKS} samples", "standard errors need them")
    edges = [i * len(x) // BLOCKS for i in range(BLOCKS + 1)]
    return [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def frechet_score(features: Tensor, reference: Gaussian) -> Estimate:
    """Fréchet distance of features (N, D) to a reference, with its standard error by the delete-one-block jackknife.

    The distance falls as N grows (fewer samples estimate the covariance worse), so that distances of small subsets
    would show this bias instead of the spread. Leaving out one block in ten hardly changes N. Variance = (BLOCKS - 1) x
    the variance of the ten leave-one-out distances (Künsch, Annals of Statistics 17, 1989). The reference's own error
    is not included.
    """
    parts = [Moments.of(part) for part in blocks(features.to(reference.mean.device))]
    value = frechet_distance(merge(parts).gaussian(), reference)
    without = [
        frechet_distance(merge(parts[:i] + parts[i + 1 :]).gaussian(), reference)  # all but the i-th
        for i in range(BLOCKS)
    ]
    centre = sum(without) / BLOCKS
    return Estimate(value, sqrt((BLOCKS - 1) / BLOCKS * sum((d - centre) ** 2 for d in without)))


def inception_score(probabilities: Tensor, splits: str = "ordered") -> Estimate:
    """exp of the mean KL divergence of p(y|x) (N, classes) from their mean; the mean over splits.

    splits: "ordered", consecutive ones of 5,000 (ADM), or "shuffled", ten of numpy's permutation (torch-fidelity).
    """
    p = probabilities.double()
    if splits == "shuffled":
        order = np.random.RandomState(SHUFFLE_SEED).permutation(len(p))
        parts = blocks(p[torch.from_numpy(order).to(p.device)])
    else:
        parts = p.split(SPLIT)
    scores = []
    for p in parts:
        mean = p.mean(0, keepdim=True)
        scores.append(float(torch.special.xlogy(p, p).sub(torch.special.xlogy(p, mean)).sum(1).mean().exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    stderr = float(values.std() / sqrt(len(scores))) if len(scores) > 1 else None
    return Estimate(float(values.mean()), stderr)


def precision_recall(features: Tensor, real: Tensor) -> tuple[Estimate, Estimate]:
    """Share of samples (N, D) near real ones (M, D), and of real ones near samples (Kynkäänniemi, arXiv 1904.06991).

    Near is: not farther from one of them than its third neighbour among its own. The distances are taken in fp32,
    where ADM takes fp16, some rows at a time.
    """
    features, real = features.float(), real.float()
    inside = _inside(features, real, _squared_radii(real)).double()
    covered = _inside(real, features, _squared_radii(features)).double()
    return _share(inside), _share(covered)


def _share(hits: Tensor) -> Estimate:
    if len(hits) < 2 * BLOCKS:  # a reference may hold a few images only
        return Estimate(float(hits.mean()))
    means = torch.stack([part.mean() for part in blocks(hits)])
    return Estimate(float(hits.mean()), float(means.std() / sqrt(BLOCKS)))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)).clamp(min=0)


def _squared_radii(x: Tensor) -> Tensor:
    # the nearest one is the sample itself
    require(len(x) > NEIGHBOURS, "count", len(x), f"more than {NEIGHBOURS} images", "draw more")
    return torch.cat([_squared_distances(rows, x).kthvalue(NEIGHBOURS + 1).values for rows in x.split(ROWS)])


def _inside(x: Tensor, centres: Tensor, squared_radii: Tensor) -> Tensor:
    return torch.cat([(_squared_distances(rows, centres) <= squared_radii).any(1) for rows in x.split(ROWS)])
