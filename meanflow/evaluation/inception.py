"""The network of the FID: the Inception-v3 that TensorFlow published on 2015-12-05, with its weights from a local file.

Its graph differs from the paper's and from torchvision's: average pools leave the padding out of the mean, the last
block pools by maximum, and it has 1008 classes. The names are those of the ported weight file.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError

SIZE, CLASSES = 299, 1008
POOL3, SPATIAL_CHANNELS, SPATIAL = 2048, 7, 7 * 17 * 17
STANDARD = "pt_inception-2015-12-05-6726825d.pth"
SOURCE = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{STANDARD}"
STANDARD_DIGEST = "6726825d"
"""The first digits of the weight file's SHA-256, as its name says."""


class Conv(NamedTuple):
    """A convolution in a branch: its name in the weight file, channels, kernel and stride."""

    name: str
    out: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


class Branch(NamedTuple):
    """A way through a block: a pool or none, then convolutions; those of an inner tuple run side by side."""

    steps: tuple[Conv | tuple[Conv, ...], ...]
    pool: str = ""


def mean_pool(x: Tensor) -> Tensor:
    """Average pool of 3x3 that leaves the padding out of the mean."""
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """Maximum pool of 3x3, stride 1; keeps the size."""
    return functional.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    """Maximum pool of 3x3, stride 2."""
    return functional.max_pool2d(x, 3, stride=2)


POOLS = {"mean": mean_pool, "max": max_pool, "halve": halve}


class ConvNorm(nn.Module):
    """Convolution, batch norm by its running statistics, ReLU; padded to keep the size unless it strides."""

    def __init__(self, channels: int, conv: Conv, padded: bool | None = None):
        super().__init__()
        kernel = (conv.kernel, conv.kernel) if isinstance(conv.kernel, int) else conv.kernel
        padded = conv.stride == 1 if padded is None else padded
        padding = tuple(k // 2 for k in kernel) if padded else 0
        self.conv = nn.Conv2d(channels, conv.out, kernel, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Mixed(nn.Module):
    """A block: branches side by side, their channels one after the other."""

    def __init__(self, channels: int, *branches: Branch):
        super().__init__()
        self.branches, self.out = branches, 0
        for branch in branches:
            width = channels
            for step in branch.steps:
                convs = (step,) if isinstance(step, Conv) else step
                for conv in convs:
                    self.add_module(conv.name, ConvNorm(width, conv))
                width = sum(conv.out for conv in convs)
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._follow(branch, x) for branch in self.branches], 1)

    def _follow(self, branch: Branch, x: Tensor) -> Tensor:
        if branch.pool:
            x = POOLS[branch.pool](x)
        for step in branch.steps:
            convs = (step,) if isinstance(step, Conv) else step
            x = torch.cat([self.get_submodule(conv.name)(x) for conv in convs], 1)
        return x


def _wide(pooled: int) -> tuple[Branch, ...]:
    """Mixed_5: at 35x35."""
    return (
        Branch((Conv("branch1x1", 64),)),
        Branch((Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5))),
        Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3))),
        Branch((Conv("branch_pool", pooled),), "mean"),
    )


def _to_17() -> tuple[Branch, ...]:
    """Mixed_6a: from 35x35 to 17x17."""
    return (
        Branch((Conv("branch3x3", 384, 3, 2),)),
        Branch((Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2))),
        Branch((), "halve"),
    )


def _long(c: int) -> tuple[Branch, ...]:
    """Mixed_6b to 6e: at 17x17, kernels of 7."""
    across, down = (1, 7), (7, 1)
    twice = (Conv("branch7x7dbl_1", c), Conv("branch7x7dbl_2", c, down), Conv("branch7x7dbl_3", c, across))
    twice += (Conv("branch7x7dbl_4", c, down), Conv("branch7x7dbl_5", 192, across))
    return (
        Branch((Conv("branch1x1", 192),)),
        Branch((Conv("branch7x7_1", c), Conv("branch7x7_2", c, across), Conv("branch7x7_3", 192, down))),
        Branch(twice),
        Branch((Conv("branch_pool", 192),), "mean"),
    )


def _to_8() -> tuple[Branch, ...]:
    """Mixed_7a: from 17x17 to 8x8."""
    long = (Conv("branch7x7x3_1", 192), Conv("branch7x7x3_2", 192, (1, 7)))
    long += (Conv("branch7x7x3_3", 192, (7, 1)), Conv("branch7x7x3_4", 192, 3, 2))
    return (
        Branch((Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, 2))),
        Branch(long),
        Branch((), "halve"),
    )


def _forked(pool: str) -> tuple[Branch, ...]:
    """Mixed_7b and 7c: at 8x8."""
    fork = (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))
    deep_fork = (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1)))
    return (
        Branch((Conv("branch1x1", 320),)),
        Branch((Conv("branch3x3_1", 384), fork)),
        Branch((Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, 3), deep_fork)),
        Branch((Conv("branch_pool", 192),), pool),
    )


class Inception(nn.Module):
    """The feature network. Loads the ported weight file strictly."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, Conv("", 32, 3, 2))
        self.Conv2d_2a_3x3 = ConvNorm(32, Conv("", 32, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, Conv("", 64, 3))
        self.Conv2d_3b_1x1 = ConvNorm(64, Conv("", 80))
        self.Conv2d_4a_3x3 = ConvNorm(80, Conv("", 192, 3), padded=False)
        width = 192
        for name, branches in {
            "Mixed_5b": _wide(32), "Mixed_5c": _wide(64), "Mixed_5d": _wide(64), "Mixed_6a": _to_17(),
            "Mixed_6b": _long(128), "Mixed_6c": _long(160), "Mixed_6d": _long(160), "Mixed_6e": _long(192),
            "Mixed_7a": _to_8(), "Mixed_7b": _forked("mean"), "Mixed_7c": _forked("max"),
        }.items():  # fmt: skip
            block = Mixed(width, *branches)
            self.add_module(name, block)
            width = block.out
        self.fc = nn.Linear(width, CLASSES)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, 299, 299), scaled as TensorFlow's graph does -> pool3 (B, 2048), spatial (B, 2023).

        spatial is ADM's `mixed_6/conv:0[..., :7]`, the first channels of Mixed_6d, in TensorFlow's order (height,
        width, channel), as in ADM's statistics files.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B, 2048, 8, 8)
        return x.mean((2, 3)), spatial

    def probabilities(self, pool3: Tensor) -> Tensor:
        """Compute class probabilities (N, 1008) of pool3 (N, 2048), without the bias, as ADM and torch-fidelity do."""
        return (pool3 @ self.fc.weight.T).softmax(1)


def load_inception(path: Path | None, device: torch.device | str) -> tuple[Inception, str]:
    """Load the network from a local file, .pth or .safetensors; returns it and the file's SHA-256. Downloads nothing.

    Raises:
        UserError: for a file that is not named, missing, damaged, of other weights, or that holds code.
    """
    if path is None or not path.is_file():
        got = "no file" if path is None else str(path)
        raise UserError(
            f"inception: got {got}, wanted the weights of the FID's network, {STANDARD}; fetch {SOURCE} and pass it by "
            "--inception FILE"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if named and not digest.startswith(named[1]):
        raise UserError(
            f"inception: got {path}, whose SHA-256 begins with {digest[:8]}, wanted {named[1]} as its name says; "
            f"it is damaged, fetch {SOURCE} again"
        )
    net = Inception()
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(weights)
    except Exception as error:  # whatever a broken or malicious file makes its reader raise
        reason = " ".join(str(error).split()[:24]) or type(error).__name__
        raise UserError(
            f"inception: got {path}, which is refused ({reason} ...), wanted tensors alone, {STANDARD}; fetch {SOURCE}"
        ) from None
    return net.to(device), digest
