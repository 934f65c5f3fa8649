"""Fréchet distance between Gaussians, and the statistics it is computed from: streamed, in fp64, over any processes."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, require

KEYS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2")}
"""Keys in a statistics file: those of ADM's evaluation for the Inception's features, our own for DINOv2's."""
# the official MeanFlow code writes its own statistics under other names
_READABLE = (*KEYS.items(), ("pool3", ("ref_mu", "ref_sigma")))


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features."""

    mean: Tensor
    """(D,) fp64."""
    covariance: Tensor
    """(D, D) fp64."""

    @cached_property
    def factor(self) -> Tensor:
        """F (D, rank) with F F^T = covariance; eigenvalues that rounding cannot tell from zero are zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Moments:
    """Count, mean and comoment of features; those of several sets can be merged.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count: int
    mean: Tensor
    """(D,) fp64."""
    comoment: Tensor
    """(D, D) fp64, the sum of the outer products of the deviations from the mean."""

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Compute the moments of features (N, D) of any floating dtype, N may be 0, on their device."""
        features = features.double()
        if len(features) == 0:
            width = features.shape[1]
            return cls(0, features.new_zeros(width), features.new_zeros(width, width))
        mean = features.mean(0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        if not self.count or not other.count:
            return self if self.count else other
        count, step = self.count + other.count, other.mean - self.mean
        comoment = self.comoment + other.comoment + torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), comoment)

    def gaussian(self) -> Gaussian:
        """The normal distribution with their mean and unbiased covariance.

        Raises:
            UserError: for fewer than two samples.
        """
        require(self.count > 1, "count", self.count, "at least two images", "a covariance needs them; draw more")
        return Gaussian(self.mean, self.comoment / (self.count - 1))

    def to(self, device: torch.device | str) -> "Moments":
        """Copy to another device."""
        return Moments(self.count, self.mean.to(device), self.comoment.to(device))


def merge(parts: Iterable[Moments]) -> Moments:
    """Merge moments in the given order: the same parts give the same bits."""
    return reduce(Moments.merged, parts)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Dowson & Landau, 1982).

    With A = F F^T and B = G G^T the trace of (A B)^(1/2) is the sum of the singular values of F^T G: no square root is
    taken of rounding errors, so that singular covariances (fewer samples than dimensions) are as exact as others.

    Raises:
        UserError: for features of different widths.
    """
    got, wanted = tuple(b.mean.shape), tuple(a.mean.shape)
    require(got == wanted, "statistics", got, f"the shape {wanted}", "both must be of the same features")
    cross = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    gap = (a.mean - b.mean).square().sum()
    return float(gap + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def write_statistics(path: Path, statistics: dict[str, Gaussian], **facts: object) -> None:
    """Write a statistics file, whole or not at all: ADM's keys, and facts as JSON-like scalars beside them.

    Args:
        path: an .npz that np.load reads without pickle.
        statistics: by the features' names, see KEYS.
        facts: numbers and strings that say where the statistics come from.
    """
    arrays = {name: np.array(value) for name, value in facts.items()}
    for name, gaussian in statistics.items():
        for key, x in zip(KEYS[name], (gaussian.mean, gaussian.covariance), strict=True):
            arrays[key] = x.cpu().numpy()
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"statistics: got {path}, which cannot be written ({error}), wanted a writable folder; name another"
        ) from None


def read_statistics(path: Path, device: torch.device | str = "cpu") -> dict[str, Gaussian]:
    """Read the distributions in an .npz, by the features' names; empty if it holds none.

    Raises:
        UserError: for a file that is missing, damaged, pickled, or whose shapes do not fit each other.
    """
    found = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name, keys in _READABLE:
                if all(key in arrays for key in keys):
                    found[name] = Gaussian(*(torch.from_numpy(arrays[k]).double().to(device) for k in keys))
    except Exception as error:  # whatever a broken archive makes its reader raise
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"reference: got {path}, which cannot be read ({reason}), wanted an .npz of statistics or images; "
            "fetch it again or name another"
        ) from None
    for name, gaussian in found.items():
        mean, covariance = gaussian.mean, gaussian.covariance
        fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        finite = bool(mean.isfinite().all() and covariance.isfinite().all())
        got, wanted = (
            f"{name} {tuple(mean.shape)}, {tuple(covariance.shape)}",
            "a finite mean (D,) and covariance (D, D)",
        )
        require(fits and finite, f"reference {path}", got, wanted, "fetch it again or name another")
    return found
