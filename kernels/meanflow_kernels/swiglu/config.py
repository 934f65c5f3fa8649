"""Launch configs of swiglu: one for all architectures and widths, no shared memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FlatConfig:
    """A program's share of y, whose elements are taken in the order of memory."""

    block: int
    """Elements, a power of two."""
    num_warps: int


# 16 elements a thread: of 16-bit data, two 16-byte loads of each half, and as many of its tangent, are on their way at
# once
FORWARD = FlatConfig(block=2048, num_warps=4)

# two 16-byte loads of three tensors, and two stores of two
BACKWARD = FlatConfig(block=2048, num_warps=4)
