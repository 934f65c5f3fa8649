"""What all networks share: conditions, heads, a forward written once on (primal, tangent) pairs. Blocks are theirs.

Letters: B batch, L tokens, C model width, p patch. A plain forward is a dual forward whose tangents are absent. The
conditions (class, times, guidance) are embedded, each as a vector; their sum modulates the layers (adaLN), or they are
tokens before those of the patches (in context). The blocks of a head for v, the instantaneous velocity, branch off
before the last blocks of u, the average one.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meanflow_kernels import linear_jvp, silu_jvp
from meanflow_kernels.dual import forbid_gradient
from meanflow_kernels.linear import chunks

from ..errors import require
from ..recipe import GUIDANCE
from .copies import Kept, keep_copies
from .pairs import Dual, LabelEmbedder, Linear, PatchEmbed, TimestepEmbedder, apply_dual, unpatchify

TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
"""Tokens of each condition in context, in the order of the sequence, before the patches (improved MeanFlow)."""
STACKS = {"weight": "modulation_copy", "bias": "modulation_bias_copy"}
"""Buffers of `Transformer.make_copies` that hold the copies of all layers that modulate, by their parameter's name."""

Head = Literal["u", "v", "uv", "log_variance"]


class Residual(NamedTuple):
    """The residual stream s = x + gate * (branch + bias) (B, L, C) between two layers, not yet added up.

    The next norm adds it up, in one pass over memory.
    """

    x: Dual
    branch: Dual | None = None
    gate: Dual | None = None
    bias: Tensor | None = None

    def map(self, f: Callable[[Dual], Dual]) -> "Residual":
        """Change its tokens, x and branch."""
        return self._replace(x=f(self.x), branch=None if self.branch is None else f(self.branch))


class Transformer(nn.Module):
    """u(z, r, t | y, guidance) and v(z, t | ...); a subclass has the blocks, their last layers and the positions.

    Args:
        input_size: height and width of the latents. patch_size: p. in_channels: channels of the latents.
        hidden_size: C. num_classes: classes without the null class, whose label is ``num_classes``.
        time_embedding: which of "t", "r" and "h" (= t - r) are embedded, each by its own MLP (paper, Table 1c), or
            "tau" (= 1 - t) and "level" (= -log2(h), h > 0).
        time_scale: what they are multiplied by before that.
        guidance_input: what is embedded of the guidance, "none", "omega" or "interval".
        in_context: whether conditions are tokens, or their sum modulates the layers.
        compute_dtype: dtype of matrix products and attention; None is the parameters' dtype. The residual stream, the
            norms' statistics, time features and the output keep the parameters' dtype.
    """

    blocks: Iterable[nn.Module]
    """All blocks."""

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        num_classes: int,
        time_embedding: Iterable[str],
        time_scale: float = 1.0,
        guidance_input: str,
        in_context: bool,
        compute_dtype: torch.dtype | None,
    ):
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.in_context, self.compute_dtype = num_classes, in_context, compute_dtype
        self.time_embedding, self.time_scale = tuple(time_embedding), time_scale
        self.guidance = GUIDANCE[guidance_input]
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)

    def _add_embedders(self, names: Iterable[str], hidden_size: int) -> None:
        """Make the conditions' embedders, in this order, and in context their tokens."""
        for name in names:
            label = name == "y"
            self.add_module(
                f"{name}_embedder",
                LabelEmbedder(self.num_classes, hidden_size) if label else TimestepEmbedder(hidden_size),
            )
        for name, count in self.tokens.items():
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.empty(count, hidden_size)))

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        raise NotImplementedError

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens before those of the patches, by condition; none where conditions modulate."""
        groups = ("class", *self.guidance, "time") if self.in_context else ()
        return {name: TOKENS[name] for name in groups}

    def _shared(self) -> Iterable[nn.Module]:
        """The blocks of both heads."""
        raise NotImplementedError

    def _own(self, head: str) -> tuple[Iterable[nn.Module], nn.Module]:
        """The blocks and the last layer of a head."""
        raise NotImplementedError

    def _final_layers(self) -> list[nn.Module]:
        """The last layers of all heads."""
        raise NotImplementedError

    def _positioned(self, patches: Dual) -> Dual:
        """Tokens of the patches (B, L, C) with their positions, where those are added."""
        return patches

    def _rotations(self) -> tuple[Tensor, ...]:
        """What a block is told of the positions."""
        return ()

    def make_copies(self) -> list[Tensor | None]:
        """Keep what the linear layers read in compute_dtype too, for an optimizer to keep up to date.

        The copies of all layers that modulate lie one below the other, so that one product modulates all.

        Returns:
            The copies in the order of parameters(), None for a parameter without one.
        """
        copies = keep_copies(self)
        # a block that is computed again makes its own
        if copies and not self.in_context and not any(block.checkpointed for block in self.blocks):
            layers = [layer.adaLN_modulation[1] for layer in self._modulated()]
            for name, buffer in Linear.buffers_of.items():
                whole = torch.cat([getattr(layer, buffer) for layer in layers])
                self.register_buffer(STACKS[name], whole, persistent=False)
                for layer, part in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
                    copies[getattr(layer, name)] = part
                    setattr(layer, buffer, part)
        return [copies.get(p) for p in self.parameters()]

    def kept_copies(self) -> list[Kept]:
        """The copies of many layers in one, if there are any."""
        stacks = ((name, stack) for name, stack in STACKS.items() if hasattr(self, stack))
        return [
            Kept(self, stack, tuple(getattr(layer.adaLN_modulation[1], name) for layer in self._modulated()))
            for name, stack in stacks
        ]

    def _modulated(self) -> list[nn.Module]:
        return [*self.blocks, *self._final_layers()]

    def _modulations(self, c: Dual | None) -> dict[nn.Module, list[Dual]]:
        """The shifts, scales and gates (B, C) of each block and last layer; nothing where each makes its own."""
        weight, bias = (getattr(self, stack, None) for stack in STACKS.values())
        usable = c is not None and weight is not None and weight.dtype == c.primal.dtype
        # a gradient reaches the layers where `products_kept` has made its way: not where processes sum it, each layer's
        # as soon as it is there
        usable = usable and (weight.requires_grad or not torch.is_grad_enabled())
        layers = self._modulated() if usable else []
        if not layers or any(_hooked(module) for layer in layers for module in layer.adaLN_modulation.modules()):
            return {}
        width = c.primal.shape[-1]
        y, y_dot = linear_jvp((c.primal,), (c.tangent,), weight, bias)  # (B, 6 C a block and 2 C a last layer)
        primals = chunks(y, y.shape[-1] // width)
        tangents = [None] * len(primals) if y_dot is None else y_dot.detach().split(width, -1)
        parts = iter([Dual(x, x_dot, c.tangent_start) for x, x_dot in zip(primals, tangents, strict=True)])
        return {
            layer: list(itertools.islice(parts, layer.adaLN_modulation[1].out_features // width)) for layer in layers
        }

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        omega: Tensor | None = None,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        *,
        head: Head = "u",
        tangents: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
        tangent_start: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The velocities of some heads, and u's derivative along a direction if one is given.

        Args:
            z: noised latents (B, channels, size, size). r, t: times (B,). y: labels (B,), int64.
            omega: guidance scales (B,), 1 by default. t_min, t_max: where guidance acts (B,), [0, 1] by default.
            head: whose blocks run; log_variance: u's, and w(t) (B,), the log-variance of u's error, is behind u.
            tangents: direction (z_dot, r_dot, t_dot) for the samples that need it; an entry None is zero. No gradient
                flows through it. It runs through the shared blocks and u's.
            tangent_start: the first sample that has a tangent, where not the whole batch has one.
            dtype: of products and attention in this call, instead of compute_dtype.

        Returns:
            u, v or (u, v), shaped like z; with tangents, (u, u_dot) or (u, v, u_dot), where u_dot has a row for each
            row of the tangents.

        Raises:
            UserError: for guidance that the network does not embed.
        """
        dtype = dtype or self.compute_dtype or self.dtype
        z_dot, r_dot, t_dot = tangents or (None, None, None)
        times = self._scaled(Dual(r, r_dot, tangent_start)), self._scaled(Dual(t, t_dot, tangent_start))
        x = self._positioned(self.x_embedder(Dual(z, z_dot, tangent_start), dtype).to(self.dtype))  # (B, grid^2, C)
        vectors, c = self._embed(*times, y, (omega, t_min, t_max), dtype), None
        if self.in_context:
            x = self._with_tokens(x, vectors)  # (B, L, C)
        else:
            c = apply_dual(silu_jvp, functools.reduce(operator.add, vectors.values())).to(dtype)  # (B, C)
        modulations = self._modulations(c)
        residual = self._run(self._shared(), Residual(x), c, dtype, modulations)
        outputs, u_dot = [], None
        if "v" != head:
            u, u_dot, _ = self._head("u", residual, c, dtype, modulations)
            outputs.append(u)
        if head == "log_variance":
            outputs.append(self._log_variance(times[1].primal))
        elif "v" in head:
            primals = Residual(*(Dual(x.primal) if isinstance(x, Dual) else x for x in residual))
            c = None if c is None else Dual(c.primal)
            modulations = {layer: [Dual(x.primal) for x in parts] for layer, parts in modulations.items()}
            outputs.append(self._head("v", primals, c, dtype, modulations).primal)
        if tangents is not None:
            outputs.append(forbid_gradient(u_dot, outputs[0]))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _scaled(self, time: Dual) -> Dual:
        return time if self.time_scale == 1 else time.map(lambda a: a * self.time_scale)

    def _log_variance(self, t: Tensor) -> Tensor:
        """w (B,) of scaled times, of a network that learns it."""
        raise NotImplementedError

    def _embed(
        self, r: Dual, t: Dual, y: Tensor, guidance: tuple[Tensor | None, ...], dtype: torch.dtype
    ) -> dict[str, Dual]:
        """The vector (B, C) of each condition."""
        scalars = {"t": t, "r": r, "h": t + r.map(torch.neg)}
        if "level" in self.time_embedding:
            scalars["tau"] = t.map(torch.neg)._replace(primal=self.time_scale - t.primal)
            scalars["level"] = _level(scalars["h"], self.time_scale)
        defaults = (torch.ones_like, torch.zeros_like, torch.ones_like)
        for name, given, default in zip(GUIDANCE["interval"], guidance, defaults, strict=True):
            known, hint = name in self.guidance, "leave it out"
            require(known or given is None, name, "a tensor", "none: this network is not told it", hint)
            value = default(t.primal) if given is None else given
            scalars[name] = Dual(1 - 1 / value if name == "omega" else value)
        vectors = {"y": Dual(self.y_embedder(y))}
        for name in (*self.time_embedding, *self.guidance):
            vectors[name] = self.get_submodule(f"{name}_embedder")(scalars[name], dtype).to(self.dtype)
        return vectors

    def _with_tokens(self, patches: Dual, vectors: dict[str, Dual]) -> Dual:
        """Tokens of the conditions before those of the patches (B, L, C): learned ones plus the condition's vector."""
        time = functools.reduce(operator.add, (vectors[name] for name in self.time_embedding))
        vectors = {"class": vectors["y"], **vectors, "time": time}
        tokens = [getattr(self, f"{name}_tokens") + vectors[name].primal[:, None] for name in self.tokens]
        primal = torch.cat([*tokens, patches.primal], 1)
        if time.tangent is None and patches.tangent is None:
            return Dual(primal)
        start, n = next((x.tangent_start, len(x.tangent)) for x in (time, patches) if x.tangent is not None)
        tangent = primal.new_zeros(n, *primal.shape[1:])
        before, count = primal.shape[1] - patches.primal.shape[1], TOKENS["time"]
        # only times and patches have a tangent
        parts = [tangent[:, : before - count], tangent[:, before - count : before], tangent[:, before:]]
        if time.tangent is not None:
            parts[1] = time.tangent[:, None].expand(-1, count, -1)
        if patches.tangent is not None:
            parts[2] = patches.tangent
        return Dual(primal, torch.cat(parts, 1), start)

    def _run(self, blocks, residual: Residual, c: Dual | None, dtype: torch.dtype, modulations: dict) -> Residual:
        for block in blocks:
            residual = block(residual, c, dtype, modulations.get(block), *self._rotations())
        return residual

    def _head(self, head: str, residual: Residual, c: Dual | None, dtype: torch.dtype, modulations: dict) -> Dual:
        """A velocity like the latents (B, channels, size, size)."""
        blocks, final_layer = self._own(head)
        residual = self._run(blocks, residual, c, dtype, modulations)
        grid = self.input_size // self.patch_size
        if self.in_context:
            residual = residual.map(lambda x: x.map(lambda a: a[:, -grid * grid :]))
        out = final_layer(residual, c, dtype, modulations.get(final_layer)).to(self.dtype)  # (B, grid^2, p p channels)
        return out.map(lambda a: unpatchify(a, self.patch_size, grid))


def _level(h: Dual, scale: float) -> Dual:
    rate, level = -scale / (log(2) * h.primal[h.tangent_start :]), -scale * torch.log2(h.primal / scale)
    return h._replace(primal=level, tangent=None if h.tangent is None else rate * h.tangent)


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """The layer that makes of the condition so many vectors for a layer's norms and gates."""
    # DiT's names count a SiLU, which is the same for all layers: the network applies it once
    return nn.Sequential(nn.Identity(), Linear(hidden_size, parts * hidden_size))


def _hooked(module: nn.Module) -> bool:
    """Whether someone waits for the module to be called."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, kind) for kind in kinds)


def checkpointed(branches: Callable[[Residual, Dual | None], Residual], residual: Residual, c: Dual | None) -> Residual:
    """Compute branches(residual, c), which backward computes again instead of keeping its activations."""
    if torch.compiler.is_compiling():
        return checkpoint(branches, residual, c, use_reentrant=False, preserve_rng_state=False)
    # backward needs only the primals: recompute without tangents, and do not keep them until then
    duals = [(residual, c)]

    def run(bias: Tensor | None, *primals: Tensor | None) -> Residual:
        if duals:
            return branches(*duals.pop())
        x, branch, gate, c = (None if x is None else Dual(x) for x in primals)
        return branches(Residual(x, branch, gate, bias), c)

    *stream, bias = residual
    primals = (None if x is None else x.primal for x in (*stream, c))
    return checkpoint(run, bias, *primals, use_reentrant=False, preserve_rng_state=False)
