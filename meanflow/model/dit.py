"""The diffusion transformer of MeanFlow, u(z, r, t | y), and its blocks.

Letters: B batch, L tokens, C model width, H heads, D head width, p patch. Class and parameter names are DiT's (Peebles
& Xie, arXiv 2212.09748); the architecture is the one of the official MeanFlow code (Gsunshine/meanflow). With a head
for v, guidance as input or conditions in context it is a rung of improved MeanFlow's ladder (arXiv 2512.02012).
"""

import functools

import torch
from torch import Tensor, nn

from meanflow_kernels import adaln_jvp, attention_qkv_jvp, gate_adaln_jvp, timestep_embedding

from .pairs import TIME_FEATURES, BranchEnd, Dual, Linear, LinearGelu, Projection, apply_dual
from .transformer import Residual, Transformer, checkpointed, modulation

LABEL_STD = TIME_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Projection(hidden_size, 3 * hidden_size)
        self.proj = BranchEnd(hidden_size, hidden_size)

    def forward(self, x: Dual) -> tuple[Dual, Tensor]:
        """x (B, L, C) -> (B, L, C), and the bias (C,) that is to be added to it."""
        qkv, bias = self.qkv(x)
        qkv = qkv.map(lambda a: a.unflatten(-1, (3, self.num_heads, -1)))  # (B, L, 3, H, D)
        o = apply_dual(attention_qkv_jvp, qkv, bias=bias)  # (B, L, H, D)
        return self.proj(o.map(lambda a: a.flatten(2)))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, hidden_size: int, mlp_hidden: int):
        super().__init__()
        self.fc1 = LinearGelu(hidden_size, mlp_hidden)
        self.fc2 = BranchEnd(mlp_hidden, hidden_size)

    def forward(self, x: Dual) -> tuple[Dual, Tensor]:
        """x (B, L, C) -> (B, L, C), and the bias (C,) that is to be added to it."""
        return self.fc2(self.fc1(x))


class Modulated(nn.Module):
    """A layer whose norms and gates are modulated by vectors made of the condition; in context by learned ones, which
    start at zero as adaLN's do.
    """

    def add_modulation(self, hidden_size: int, parts: int, in_context: bool) -> None:
        """Make the layer, or the vectors themselves; after all others, as DiT does."""
        self.parts = parts
        if in_context:
            self.modulation = nn.Parameter(torch.empty(parts, hidden_size))
        else:
            self.adaLN_modulation = modulation(hidden_size, parts)

    def modulate(self, residual: Residual, c: Dual | None, dtype: torch.dtype, made: list[Dual] | None) -> list[Dual]:
        """The vectors (B, C); made: what the network has made of c already, or None."""
        if made is not None:
            return made
        if c is not None:
            return self.adaLN_modulation(c).split(self.parts)
        # a copy: the next layer applies a gate, when this one's parameters may be gone (FSDP)
        vectors, batch = self.modulation.to(dtype, copy=True), len(residual.x.primal)
        return [Dual(x.expand(batch, -1)) for x in vectors.unbind()]


def adaln(residual: Residual, shift: Dual, scale: Dual, dtype: torch.dtype) -> tuple[Dual, Dual]:
    """The stream added up, and its LayerNorm (1 + scale) + shift in dtype, each (B, L, C); shift, scale (B, C)."""
    if residual.branch is None:
        return residual.x, apply_dual(adaln_jvp, residual.x, shift, scale, out_dtype=dtype)
    duals = (residual.x, residual.branch, residual.gate, shift, scale)
    return apply_dual(gate_adaln_jvp, *duals, bias=residual.bias, out_dtype=dtype)


class DiTBlock(Modulated):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, checkpointed: bool = False, in_context: bool = False
    ):
        super().__init__()
        self.checkpointed = checkpointed
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.add_modulation(hidden_size, 6, in_context)

    def forward(
        self, residual: Residual, c: Dual | None, dtype: torch.dtype, made: list[Dual] | None = None
    ) -> Residual:
        """residual of (B, L, C); c (B, C), SiLU already applied, or None in context; dtype of the matrix products.

        made: what adaLN_modulation makes of c, in six parts, if the network has made it.
        """
        # inside the block, so that its hooks (FSDP's) run once a pass
        if self.checkpointed and torch.is_grad_enabled():
            return checkpointed(functools.partial(self._branches, dtype=dtype), residual, c)
        return self._branches(residual, c, dtype, made)

    def _branches(self, residual: Residual, c: Dual | None, dtype: torch.dtype, made=None) -> Residual:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.modulate(residual, c, dtype, made)
        x, h = adaln(residual, shift_msa, scale_msa, dtype)  # (B, L, C)
        branch, bias = self.attn(h)
        x, h = adaln(Residual(x, branch, gate_msa, bias), shift_mlp, scale_mlp, dtype)  # (B, L, C)
        branch, bias = self.mlp(h)
        return Residual(x, branch, gate_mlp, bias)


class FinalLayer(Modulated):
    """The last adaLN and the projection to pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, in_context: bool = False):
        super().__init__()
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.add_modulation(hidden_size, 2, in_context)

    def forward(self, residual: Residual, c: Dual | None, dtype: torch.dtype, made: list[Dual] | None = None) -> Dual:
        """residual of (B, L, C) -> (B, L, p p channels); the others as for a block, made in two parts."""
        shift, scale = self.modulate(residual, c, dtype, made)  # (B, C)
        _, h = adaln(residual, shift, scale, dtype)  # (B, L, C)
        return self.linear(h)


class DiT(Transformer):
    """u(z, r, t | y), the average velocity from t back to r; with a head for v also v(z, t | y), the velocity at t.

    Args:
        depth: blocks from the input to u. num_heads, mlp_ratio: of a block.
        head_depth: the last so many blocks of u are its own, and v has as many, behind u's in ``blocks``. 0: no v.
        log_variance: whether there is a linear layer on the features of t for the log-variance of u's error.
        checkpoint_blocks: compute each block a second time in backward, and keep only its inputs until then.
        The others are :class:`Transformer`'s.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        head_depth: int = 0,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        time_embedding: tuple[str, ...] = ("t", "h"),
        time_scale: float = 1.0,
        log_variance: bool = False,
        guidance_input: str = "none",
        in_context: bool = False,
        compute_dtype: torch.dtype | None = None,
        checkpoint_blocks: bool = False,
    ):
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            num_classes=num_classes,
            time_embedding=time_embedding,
            time_scale=time_scale,
            guidance_input=guidance_input,
            in_context=in_context,
            compute_dtype=compute_dtype,
        )
        self._add_embedders((*self.time_embedding, "y", *self.guidance), hidden_size)
        self._depth, self._head_depth = depth, head_depth
        block = functools.partial(DiTBlock, hidden_size, num_heads, mlp_ratio, checkpoint_blocks, in_context)
        self.blocks = nn.ModuleList(block() for _ in range(depth + head_depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels, in_context)
        if head_depth:
            self.v_final_layer = FinalLayer(hidden_size, patch_size, in_channels, in_context)
        if log_variance:
            self.log_variance = nn.Linear(TIME_FEATURES, 1)
        # on the default device, even if the parameters are on meta: a loader of weights does not fill this buffer
        table = position_table(hidden_size, input_size // patch_size, dtype=torch.get_default_dtype())
        self.register_buffer("pos_embed", table, persistent=False)
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, even while hooks keep some of them in another until they are used."""
        return self.pos_embed.dtype

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the official weights: Xavier uniform, N(0, 0.02) for times and labels, zeros for adaLN and output.

        Guidance is drawn as times are, and tokens of conditions as labels.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(module.bias)
        for name in (*self.time_embedding, *self.guidance):
            mlp = self.get_submodule(f"{name}_embedder").mlp
            nn.init.normal_(mlp[0].weight, std=TIME_STD, generator=generator)
            nn.init.normal_(mlp[2].weight, std=TIME_STD, generator=generator)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=LABEL_STD, generator=generator)
        for name in self.tokens:
            nn.init.normal_(getattr(self, f"{name}_tokens"), std=LABEL_STD, generator=generator)
        for layer in self._modulated():
            nn.init.zeros_(layer.modulation if self.in_context else layer.adaLN_modulation[1].weight)
        for layer in self._final_layers():
            nn.init.zeros_(layer.linear.weight)
        if hasattr(self, "log_variance"):
            nn.init.zeros_(self.log_variance.weight)

    def _shared(self) -> list[nn.Module]:
        return list(self.blocks)[: self._depth - self._head_depth]

    def _own(self, head: str) -> tuple[list[nn.Module], nn.Module]:
        if head == "v":
            return list(self.blocks)[self._depth :], self.v_final_layer
        return list(self.blocks)[self._depth - self._head_depth : self._depth], self.final_layer

    def _final_layers(self) -> list[nn.Module]:
        return [self.final_layer, self.v_final_layer] if self._head_depth else [self.final_layer]

    def _log_variance(self, t: Tensor) -> Tensor:
        return self.log_variance(timestep_embedding(t, TIME_FEATURES)).squeeze(1)

    def _positioned(self, patches: Dual) -> Dual:
        return patches._replace(primal=patches.primal + self.pos_embed)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.renew_position_table(self.pos_embed.dtype)
        return self

    def renew_position_table(self, dtype: torch.dtype) -> None:
        """Compute the position table again in dtype, on its device: a cast one keeps the old dtype's rounding."""
        grid, width, device = self.input_size // self.patch_size, self.pos_embed.shape[1], self.pos_embed.device
        self.pos_embed = position_table(width, grid, dtype=dtype, device=device)


def position_table(width: int, grid: int, *, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Fixed sin-cos positions (grid^2, width), rounded once to dtype (MAE's table, as DiT uses it).

    The column is in the first half of the channels, the row in the second, each as sines then cosines.
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    angles = torch.arange(grid, dtype=torch.float64, device=device)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], -1)  # (grid, width / 2)
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)
    return torch.cat([columns, rows], -1).to(dtype)
