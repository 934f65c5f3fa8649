"""Named ways to measure a generator. FIDs differ by them for the same weights; most names change one thing."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..data.images import to_uint8
from ..draws import Draws, Purpose
from ..errors import UserError, require
from .inception import SIZE


@dataclass(frozen=True)
class Protocol:
    """The choices behind a score. The defaults are the official MeanFlow code's."""

    reference: Literal["adm", "data", "imf", "jit"] = "adm"
    """Reference data: ADM's statistics of ImageNet, data of one's own, or the statistics of ImageNet's training images
    that improved MeanFlow's JAX code comes with, or JiT."""
    labels: Literal["uniform", "balanced"] = "uniform"
    """The classes asked for: drawn uniformly for each sample (official), or each equally often, in turn (successors,
    which lowers the FID by about 0.1 to 0.2)."""
    rounding: Literal["truncate", "round", "floor"] = "truncate"
    """Conversion of x in [-1, 1] to uint8: 127.5 x + 128 truncated (official); 127.5 (x + 1) to the nearest, which is
    the same except for ties; 127.5 (x + 1) truncated, half a level darker, as ADM's sampling script does."""
    resize: Literal["tensorflow", "pytorch", "clean"] = "tensorflow"
    """Resize to the network's 299 x 299: bilinear as TensorFlow 1 (official, ADM, torch-fidelity); bilinear between
    pixel centres (pytorch-fid, which also scales by x / 127.5 - 1); antialiased bicubic, as Pillow's (clean-fid)."""
    splits: Literal["ordered", "shuffled"] = "ordered"
    """Splits of the Inception Score: 5,000 samples each in order (official, ADM), or ten of a fixed permutation
    (torch-fidelity, improved MeanFlow)."""

    def describe(self) -> dict[str, str]:
        """The choices by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


OFFICIAL = Protocol()
CHANGES = {
    "official": {},
    "balanced": {"labels": "balanced"},
    "round": {"rounding": "round"},
    "floor": {"rounding": "floor"},
    "pytorch-fid": {"resize": "pytorch"},
    "clean-fid": {"resize": "clean"},
    "own-data": {"reference": "data"},
    "imf-jax": {"reference": "imf", "labels": "balanced", "splits": "shuffled"},
    "imf-torch": {"reference": "jit", "labels": "balanced", "splits": "shuffled", "rounding": "round"},
    "imf-adm": {"labels": "balanced", "rounding": "floor"},
}
"""Changes of each name to the official protocol; names joined by + change several things.

imf-jax and imf-torch are those of improved MeanFlow's two official codes (the second sorts its labels, each as often:
only the images' order differs); imf-adm is ADM's, by which others measured the same weights (its issue 5).
"""


def named(name: str) -> Protocol:
    """Look up the protocol of a name such as "official", or of several as in "balanced+own-data".

    Raises:
        UserError: for a name that does not exist, or names that contradict each other.
    """
    changes = {}
    for part in name.split("+"):
        require(part in CHANGES, "protocols", name, "names among " + " ".join(CHANGES), "join several by +")
        for axis, value in CHANGES[part].items():
            if changes.setdefault(axis, value) != value:
                raise UserError(f"protocols: got {name!r}, wanted one choice of {axis}; name them side by side instead")
    return replace(OFFICIAL, **changes)


def labels_of(kind: str, draws: Draws, num_classes: int) -> Tensor:
    """The classes (B,) int64 of the samples to draw, a function of the seed and the sample's index."""
    if kind == "balanced":
        return draws.samples % num_classes
    return draws.integers(Purpose.SAMPLE_LABEL, num_classes)


def quantize(images: Tensor, rounding: str) -> Tensor:
    """Convert images (B, C, H, W) in [-1, 1] to uint8; others are clipped."""
    if rounding == "truncate":
        return to_uint8(images)
    levels = (127.5 * (images + 1)).clamp(0, 255)
    return (levels.round() if rounding == "round" else levels).to(torch.uint8)


def tensorflow_resize(images: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 with align_corners=False: output pixel j lies at j * old / new, and nothing is smoothed.

    images (B, C, H, W) floating -> (B, C, size, size).
    """
    for axis in (-1, -2):
        length = images.shape[axis]
        place = torch.arange(size, device=images.device, dtype=images.dtype) * torch.tensor(length / size).to(images)
        low = place.long()
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).reshape(-1, *[1] * (-1 - axis))
        before = images.index_select(axis, low)
        images = before + (images.index_select(axis, high) - before) * share
    return images


def pytorch_resize(images: Tensor, size: int) -> Tensor:
    """Bilinear between pixel centres, nothing smoothed: (B, C, H, W) -> (B, C, size, size)."""
    return functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def clean_resize(images: Tensor, size: int) -> Tensor:
    """Bicubic, antialiased, in floating point, as clean-fid by Pillow (arXiv 2104.11222): (B, C, H, W), 0 to 255."""
    x = functional.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return x.clamp(0, 255)


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "tensorflow": tensorflow_resize,
    "pytorch": pytorch_resize,
    "clean": clean_resize,
}


def inception_input(images: Tensor, resize: str) -> Tensor:
    """Convert uint8 (B, 1 or 3, H, W) to the network's input (B, 3, 299, 299) fp32, grey repeated.

    Raises:
        UserError: for another dtype or number of channels.
    """
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
    got = (images.dtype, tuple(images.shape))
    require(fits, "images", got, "uint8 of shape (B, 1 or 3, H, W)", "quantize them first")
    x = RESIZES[resize](images.float(), SIZE).expand(-1, 3, -1, -1)
    return x / 127.5 - 1 if resize == "pytorch" else (x - 128) / 128
