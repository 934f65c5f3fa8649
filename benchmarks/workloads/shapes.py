"""The sizes that are measured: those of the models on a GPU, tiny ones on a CPU."""

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """Batch on one GPU, tokens, heads and the width of a head."""

    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of the model."""
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.heads}x{self.head_dim}"


MODELS = {
    "XL/2": Shape(batch=32, tokens=256, heads=16, head_dim=72),
    "B/4": Shape(batch=256, tokens=64, heads=12, head_dim=64),
}
"""The largest model of the paper, and the one of its ablations: batch 256 on eight GPUs and on one."""

IMF = {
    "iMF-XL/2": Shape(batch=32, tokens=276, heads=16, head_dim=64),
    "iMF-B/2": Shape(batch=64, tokens=276, heads=12, head_dim=64),
}
"""Improved MeanFlow's transformers, both widths: 256 patches behind 20 tokens of conditions."""

ATTENTION = {
    "hd64": Shape(batch=256, tokens=256, heads=16, head_dim=64),
    "hd72": Shape(batch=256, tokens=256, heads=16, head_dim=72),
    "hd72-N1024": Shape(batch=64, tokens=1024, heads=16, head_dim=72),
}
"""Attention alone, batch times heads 4,096 at 256 tokens; 1,024 tokens are those of ImageNet-512."""


def size_for(device: str, shape: Shape) -> Shape:
    """``shape`` on a GPU; on a CPU two samples of 16 tokens, of as many channels a head, with two heads."""
    return shape if device == "cuda" else Shape(batch=2, tokens=16, heads=2, head_dim=shape.head_dim)


def naming(op: str, label: str, shape: Shape, dtype: torch.dtype, variant: str) -> dict:
    """The columns of a row that say what was timed; ``label`` is the model's name or the regime's."""
    if shape not in (*MODELS.values(), *IMF.values(), *ATTENTION.values()):
        label = f"tiny {label}"
    columns = {"op": op, "shape": f"{label} {shape}", "dtype": str(dtype).removeprefix("torch."), "variant": variant}
    return columns | asdict(shape) | {"width": shape.width}
