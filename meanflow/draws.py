"""Random numbers as a function of (seed, purpose, step, sample): any number of processes and any resume draw the same.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer tensor operations:
the bits are the same on every device.
"""

from enum import IntEnum
from math import prod, tau

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
ROUNDS = 10


class Purpose(IntEnum):
    """The purpose of a draw; each has random numbers of its own. The values are part of what seeds mean."""

    NOISE = 0
    TIME_A = 1
    TIME_B = 2
    EQUAL = 3
    LABEL_DROP = 4
    POSTERIOR = 5
    FLIP = 6
    SAMPLE_LABEL = 7
    BOOTSTRAP = 8
    OMEGA = 9
    GUIDANCE_START = 10
    GUIDANCE_END = 11
    NOISE_LEVEL = 12
    RENOISE = 13


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four int64 tensors of 32-bit words and a key of two 32-bit words -> four words of random bits."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # the 64-bit product wraps in int64, its bits are right
        p0, p1 = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((p1 >> 32) & _MASK) ^ b ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ d ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return a, b, c, d


class Draws:
    """The draws of one step for some samples.

    Args:
        seed: of the run, in [0, 2^63).
        step: optimizer step, or any index of the draw, in [0, 2^32).
        samples: (B,) int64, each sample's index in the global batch, in [0, 2^32), on the device to draw on.
    """

    def __init__(self, seed: int, step: int, samples: Tensor):
        self.seed, self.step, self.samples = seed, step, samples

    def _words(self, purpose: Purpose, count: int, index: int = 0) -> Tensor:
        blocks = -(-count // 4)
        sample = self.samples[:, None].expand(-1, blocks)
        # the mask changes nothing, but keeps Inductor from multiplying an index in 32 bits
        places = torch.arange(index * blocks, (index + 1) * blocks, device=self.samples.device)
        block = (places & _MASK).expand_as(sample)
        constant = torch.zeros_like(sample)
        counter = (block, sample, constant + self.step, constant + int(purpose))
        words = philox(counter, (self.seed & _MASK, self.seed >> 32))
        return torch.stack(words, -1).flatten(1)  # (B, 4 blocks)

    def uniform(self, purpose: Purpose, shape: tuple[int, ...] = ()) -> Tensor:
        """(B, *shape) fp32, uniform on [0, 1), multiples of 2^-24."""
        count = prod(shape)
        return ((self._words(purpose, count)[:, :count] >> 8) * 2.0**-24).float().reshape(-1, *shape)

    def normal(self, purpose: Purpose, shape: tuple[int, ...] = (), index: int = 0) -> Tensor:
        """(B, *shape) fp32, standard normal (Box & Muller, 1958); index: which of several draws of this shape."""
        count = prod(shape)
        words = self._words(purpose, count + count % 2, index).float()
        radius = ((words[:, 0::2] + 0.5) * 2.0**-32).log().mul(-2).clamp(min=0).sqrt()
        angle = words[:, 1::2] * (tau * 2.0**-32)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)[:, :count].reshape(-1, *shape)

    def integers(self, purpose: Purpose, high: int) -> Tensor:
        """(B,) int64, uniform on 0 ... high - 1 (high < 2^24; the bias is below high 2^-24)."""
        return (self.uniform(purpose).double() * high).long()
