"""Tensors with their tangents, and the layers that compute on such pairs: linear ones, and embedders by DiT's names."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meanflow_kernels import bias_gelu_jvp, linear_jvp, silu_jvp, timestep_embedding_jvp

from .copies import Kept, by_copy

TIME_FEATURES = 256


class Dual(NamedTuple):
    """A tensor and its tangent. The tangent may be absent, or given for the samples from ``tangent_start`` on only."""

    primal: Tensor
    tangent: Tensor | None = None
    tangent_start: int | None = None

    def map(self, f) -> "Dual":
        """Apply a linear rearrangement to both."""
        return self._replace(primal=f(self.primal), tangent=None if self.tangent is None else f(self.tangent))

    def to(self, dtype: torch.dtype) -> "Dual":
        """Cast both."""
        return self.map(lambda x: x.to(dtype))

    def split(self, parts: int | Sequence[int], dim: int = -1) -> list["Dual"]:
        """Cut both along a dimension into so many equal parts, or into parts of these sizes."""
        cut = torch.chunk if isinstance(parts, int) else torch.split
        primals = cut(self.primal, parts, dim)
        tangents = [None] * len(primals) if self.tangent is None else cut(self.tangent, parts, dim)
        return [Dual(x, x_dot, self.tangent_start) for x, x_dot in zip(primals, tangents, strict=True)]

    def __add__(self, other: "Dual") -> "Dual":
        if self.tangent is None or other.tangent is None:
            tangent = self.tangent if other.tangent is None else other.tangent
        else:
            tangent = self.tangent + other.tangent
        tangent_start = self.tangent_start if other.tangent_start is None else other.tangent_start
        return Dual(self.primal + other.primal, tangent, tangent_start)

    def __mul__(self, other: "Dual") -> "Dual":
        pairs = [(x, y) for x, y in ((self, other), (other, self)) if x.tangent is not None]
        start = pairs[0][0].tangent_start if pairs else None
        tangents = [x.tangent * y.primal.detach()[start or 0 :] for x, y in pairs]
        return Dual(self.primal * other.primal, functools.reduce(operator.add, tangents) if pairs else None, start)


def apply_dual(op_jvp, *duals: Dual, **options) -> Any:
    """Apply an operator `op_jvp(primals, tangents, ...)` to `Dual`s: a `Dual`, or a tuple if it has several results."""
    tangent_start = next((x.tangent_start for x in duals if x.tangent is not None), None)
    if tangent_start is not None:
        options["tangent_start"] = tangent_start
    out, out_dot = op_jvp(tuple(x.primal for x in duals), tuple(x.tangent for x in duals), **options)
    if isinstance(out, tuple):
        return tuple(dual(y, y_dot, tangent_start) for y, y_dot in zip(out, out_dot, strict=True))
    return dual(out, out_dot, tangent_start)


def dual(x: Tensor, x_dot: Tensor | None, tangent_start: int | None) -> Dual:
    """A pair whose tangent is detached: a block's wrapper (a checkpoint, FSDP) must find no gradient in it."""
    return Dual(x, None if x_dot is None else x_dot.detach(), tangent_start)


class Linear(nn.Linear):
    """A linear layer on pairs, computed in its input's dtype.

    The buffers ``copy`` and ``bias_copy`` hold weight and bias in that dtype if an optimizer keeps them
    (`Transformer.make_copies`); without them each call casts both.
    """

    buffers_of = {"weight": "copy", "bias": "bias_copy"}
    """Names of the copies, by the name of the parameter that the product reads in its input's dtype."""

    def keep_copies(self, dtype: torch.dtype) -> dict[Tensor, Tensor]:
        """Make copies in dtype, for an optimizer to keep up to date; returns them by parameter."""
        copies = {}
        for name, buffer in self.buffers_of.items():
            if (p := getattr(self, name)) is not None:
                copies[p] = p.detach().to(dtype)
                self.register_buffer(buffer, copies[p], persistent=False)
        return copies

    def kept_copies(self) -> list[Kept]:
        """The copies that there are."""
        names = ((name, buffer) for name, buffer in self.buffers_of.items() if hasattr(self, buffer))
        return [Kept(self, buffer, (getattr(self, name),)) for name, buffer in names]

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        for kept in self.kept_copies():
            kept.copy.copy_(kept.params[0].detach())

    def forward(self, x: Dual) -> Dual:
        """x (..., in_features) -> (..., out_features)."""
        return self._product(x, None if self.bias is None else self._in("bias", x.primal.dtype))

    def _product(self, x: Dual, bias: Tensor | None) -> Dual:
        weight = self._in("weight", x.primal.dtype)
        return dual(*linear_jvp((x.primal,), (x.tangent,), weight, bias), x.tangent_start)

    def _in(self, name: str, dtype: torch.dtype) -> Tensor:
        p, buffer = getattr(self, name), self.buffers_of.get(name)
        copy = None if buffer is None else getattr(self, buffer, None)
        return p.to(dtype) if copy is None or copy.dtype != dtype else by_copy(p, copy)


class Summand(Linear):
    """A linear layer whose result is added to that of its like, of another time.

    Their biases have the same gradient. Inductor's C++ of torch 2.13 declares such a sum twice where it is stored in 16
    bits, and does not compile; so the bias has no copy, and its gradient is stored in fp32.
    """

    buffers_of = {"weight": "copy"}


class Projection(Linear):
    """The projection to q, k and v: its product with its bias, whose gradient comes from the attention of the product.

    So the product's gradient is not read a second time, for its sum alone.
    """

    def forward(self, x: Dual) -> tuple[Dual, Tensor | None]:
        """x (..., in_features) -> (..., out_features), and the bias in it, where gradients are recorded."""
        bias = self._in("bias", x.primal.dtype)
        # a view, made here: hooks cast or free the parameter before it is handed on
        return self._product(x, bias.detach()), bias.view_as(bias) if torch.is_grad_enabled() else None


class BranchEnd(Linear):
    """The last linear layer of a branch: its product, and its bias, which the kernel that adds the branch up adds."""

    buffers_of = {"weight": "copy"}

    def forward(self, x: Dual) -> tuple[Dual, Tensor]:
        """x (..., in_features) -> (..., out_features), and the bias (out_features,)."""
        # a copy, read here: hooks cast or free the parameter before the kernel runs. A compiled step makes none
        return self._product(x, None), self.bias.clone()


class LinearGelu(Linear):
    """A linear layer and its tanh-GELU, whose kernel adds the bias."""

    buffers_of = {"weight": "copy"}

    def forward(self, x: Dual) -> Dual:
        """x (..., in_features) -> (..., out_features)."""
        return apply_dual(bias_gelu_jvp, self._product(x, None), bias=self.bias)


class SiLU(nn.Module):
    """SiLU on pairs."""

    def forward(self, x: Dual) -> Dual:
        """x of any shape -> the same."""
        return apply_dual(silu_jvp, x)


class PatchEmbed(nn.Module):
    """Embed patches of p x p pixels as tokens, row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = PatchConv(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, z: Dual, dtype: torch.dtype) -> Dual:
        """z (B, channels, height, width) -> tokens (B, L, C), in dtype."""
        return self.proj(z, dtype)


class TimestepEmbedder(nn.Module):
    """Embed a scalar, such as a time, as a vector, unscaled."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FEATURES, hidden_size), SiLU(), Summand(hidden_size, hidden_size))

    def forward(self, t: Dual, dtype: torch.dtype) -> Dual:
        """t (B,) -> (B, C)."""
        return self.mlp(apply_dual(timestep_embedding_jvp, t, dim=TIME_FEATURES).to(dtype))


class LabelEmbedder(nn.Module):
    """Embed a class as a vector; the last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) -> (B, C)."""
        return self.embedding_table(y)


class PatchConv(nn.Conv2d):
    """A convolution over patches that do not overlap, on pairs, computed as a linear layer."""

    def forward(self, z: Dual, dtype: torch.dtype) -> Dual:
        """z (B, channels, height, width) -> tokens (B, L, C), in dtype."""
        weight = self.weight.flatten(1).to(dtype)
        patches = z.map(lambda x: _patchify(x, self.kernel_size[0])).to(dtype)
        bias = self.bias.to(dtype)
        return dual(*linear_jvp((patches.primal,), (patches.tangent,), weight, bias), z.tangent_start)


def _patchify(x: Tensor, p: int) -> Tensor:
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)  # (B, L, c p p), channel slowest


def unpatchify(x: Tensor, p: int, grid: int) -> Tensor:
    """Turn patches (B, L, p p channels), row by row, into latents (B, channels, height, width)."""
    x = x.reshape(x.shape[0], grid, grid, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, grid * p, grid * p)  # channel was fastest
