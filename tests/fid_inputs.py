"""Images and Inception weights that a seed makes, the same wherever numpy is: for comparisons with other libraries."""

import numpy as np
import torch
from torch import Tensor

SIDE, BLOCK = 64, 16
SAMPLE_SEED, REFERENCE_SEED, WEIGHT_SEED = 1, 2, 3
# FID of the first against the second: a few for every run, and what a comparison deserves
SMALL, LARGE = (12, 10), (2000, 500)


def images(count: int, seed: int, low: int = 0) -> Tensor:
    """uint8 (count, 3, 64, 64): coarse random colours from low to 255 under fine noise of a strength of their own."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):  # image by image: fewer images are the first of more
        coarse = rng.integers(low, 256, (3, SIDE // BLOCK, SIDE // BLOCK)).repeat(BLOCK, 1).repeat(BLOCK, 2)
        strength = rng.integers(1, 64)
        made.append(np.clip(coarse + rng.integers(-strength, strength + 1, (3, SIDE, SIDE)), 0, 255))
    return torch.from_numpy(np.stack(made).astype(np.uint8))


def samples(count: int) -> Tensor:
    """The images that are judged."""
    return images(count, SAMPLE_SEED)


def references(count: int) -> Tensor:
    """The images they are compared with: brighter."""
    return images(count, REFERENCE_SEED, low=64)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict of these shapes: uniform weights that keep the features' size (He et al., 2015), neutral norms."""
    rng = np.random.default_rng(WEIGHT_SEED)
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith((".bn.weight", ".bn.running_var")):
            state[name] = torch.ones(shape)
        elif name.endswith((".bn.bias", ".bn.running_mean")):
            state[name] = torch.from_numpy(rng.random(shape) - 0.5).float()
        else:
            # sharper in the last layer: an Inception Score of 1 would compare nothing
            bound = (6 / np.prod(shape[1:] or (2048,))) ** 0.5 * (20 if name == "fc.weight" else 1)
            state[name] = torch.from_numpy(bound * (2 * rng.random(shape) - 1)).float()
    return state
