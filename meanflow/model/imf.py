"""The transformer of improved MeanFlow, and its blocks.

Letters: B batch, L tokens, C model width, H heads, D head width, p patch. Blocks are pre-norm with RMSNorm, SwiGLU,
QK-norm and rotary positions, and each branch ends with a gate that starts at zero. After shared blocks the stream goes
through the blocks of a head for u, the average velocity, and of one for v, the instantaneous one. Conditions are tokens
(improved MeanFlow, arXiv 2512.02012; the architecture is Lyy-iiis/imeanflow's), or modulate norms and gates. Names are
DiT's.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from meanflow_kernels import attention_jvp, gate_rmsnorm_jvp, qk_rope_jvp, rmsnorm_jvp, swiglu_jvp

from .pairs import Dual, Linear, TimestepEmbedder, apply_dual
from .transformer import Residual, Transformer, checkpointed, modulation

ROPE_THETA = 10_000.0
BLOCK_STD = 0.32
"""Standard deviation of a block's weights, over the root of the layer's inputs."""
ALIGNMENT = 16
"""Columns that an MLP's hidden width is a multiple of, as its rows are stored: 2,730 become 2,736."""


def _norm(
    residual: Residual, weight: Tensor, dtype: torch.dtype, modulation: tuple[Dual, Dual] | None
) -> tuple[Dual, Dual]:
    """The stream added up (B, L, C), and its RMSNorm with a weight (C,), in dtype.

    modulation: shift and scale (B, C) of norm (1 + scale) + shift; a gate is (B, C) then, else (C,).
    """
    x, branch, gate, _ = residual
    if modulation is None and branch is not None:
        return apply_dual(gate_rmsnorm_jvp, x, branch, gate=gate.primal, weight=weight, out_dtype=dtype)
    if branch is not None:
        x = x + _of_samples(gate, x) * branch.to(x.primal.dtype)
    if modulation is None:
        return x, apply_dual(rmsnorm_jvp, x, weight=weight, out_dtype=dtype)
    # no recipe has such blocks, so no operator fuses it
    shift, scale = (_of_samples(a, x) for a in modulation)
    h = apply_dual(rmsnorm_jvp, x, weight=weight)
    return x, (h + h * scale + shift).to(dtype)


def _of_samples(vector: Dual, x: Dual) -> Dual:
    """(B, C) as (B, 1, C), in the stream's dtype."""
    return vector.map(lambda a: a[:, None].to(x.primal.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with normalised, rotated queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = nn.Parameter(torch.empty(hidden_size // num_heads))
        self.k_norm = nn.Parameter(torch.empty(hidden_size // num_heads))
        self.proj = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Dual, cos: Tensor, sin: Tensor) -> Dual:
        """x (B, L, C), cos and sin (L, D / 2) of the rotations -> (B, L, C)."""
        qkv = self.qkv(x).map(lambda a: a.unflatten(-1, (3, self.num_heads, -1)))  # (B, L, 3, H, D)
        # one split: its backward puts the gradient of the projection together in one pass
        qk, v = qkv.split((2, 1), 2)
        weights = {"q_weight": self.q_norm, "k_weight": self.k_norm}
        q, k = apply_dual(qk_rope_jvp, qk, **weights, cos=cos, sin=sin)  # (B, L, H, D)
        o = apply_dual(attention_jvp, q, k, v.map(lambda a: a.squeeze(2)))  # (B, L, H, D)
        return self.proj(o.map(lambda a: a.flatten(2)))


class SwiGLU(nn.Module):
    """w2 (silu(w1 x) * w3 x); fc1 holds w1 above w3, fc2 is w2.

    Rows of fc1 and columns of fc2 behind mlp_hidden are zero and stay so: neither gives or takes anything.
    """

    def __init__(self, hidden_size: int, mlp_hidden: int):
        super().__init__()
        self.mlp_hidden = mlp_hidden
        stored = padded(mlp_hidden)
        self.fc1 = Linear(hidden_size, 2 * stored, bias=False)
        self.fc2 = Linear(stored, hidden_size, bias=False)

    def forward(self, x: Dual) -> Dual:
        """x (B, L, C) -> (B, L, C)."""
        return self.fc2(apply_dual(swiglu_jvp, self.fc1(x)))

    @property
    def padding(self) -> tuple[Tensor, Tensor]:
        """What is stored of both weights beyond mlp_hidden (views)."""
        return self.fc1.weight.unflatten(0, (2, -1))[:, self.mlp_hidden :], self.fc2.weight[:, self.mlp_hidden :]


def padded(mlp_hidden: int) -> int:
    """The hidden width that an MLP is stored with."""
    return -(-mlp_hidden // ALIGNMENT) * ALIGNMENT


class Block(nn.Module):
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)), the gates learned vectors; or norms and gates modulated
    by the condition.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_hidden: int, checkpointed: bool = False, in_context: bool = True
    ):
        super().__init__()
        self.checkpointed = checkpointed
        for name in ("norm1", "norm2", *(("gate_msa", "gate_mlp") if in_context else ())):
            self.register_parameter(name, nn.Parameter(torch.empty(hidden_size)))
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, mlp_hidden)
        if not in_context:
            self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(
        self,
        residual: Residual,
        c: Dual | None,
        dtype: torch.dtype,
        made: list[Dual] | None,
        cos: Tensor,
        sin: Tensor,
    ) -> Residual:
        """residual of (B, L, C); cos and sin (L, D / 2); the others as for DiT's block."""
        branches = functools.partial(self._branches, dtype=dtype, cos=cos, sin=sin)
        # inside the block, so that its hooks (FSDP's) run once a pass
        if self.checkpointed and torch.is_grad_enabled():
            return checkpointed(branches, residual, c)
        return branches(residual, c, made=made)

    def _branches(
        self, residual: Residual, c: Dual | None, dtype: torch.dtype, cos: Tensor, sin: Tensor, made=None
    ) -> Residual:
        if c is None:
            first = second = None
            # a copy: the next block adds the branch, when this one's parameters may be gone (FSDP)
            gate_msa, gate_mlp = Dual(self.gate_msa), Dual(self.gate_mlp.clone())
        else:
            made = self.adaLN_modulation(c).split(6) if made is None else made
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = made
            first, second = (shift_msa, scale_msa), (shift_mlp, scale_mlp)
        x, h = _norm(residual, self.norm1, dtype, first)
        x, h = _norm(Residual(x, self.attn(h, cos, sin), gate_msa), self.norm2, dtype, second)
        return Residual(x, self.mlp(h), gate_mlp)


class FinalLayer(nn.Module):
    """The last RMSNorm and the projection to pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, in_context: bool = True):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(hidden_size))
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        if not in_context:
            self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, residual: Residual, c: Dual | None, dtype: torch.dtype, made: list[Dual] | None) -> Dual:
        """residual of (B, L, C) -> (B, L, p p channels); the others as for a block."""
        if c is not None:
            made = self.adaLN_modulation(c).split(2) if made is None else made
        _, h = _norm(residual, self.norm, dtype, made)
        return self.linear(h)


class ImfDiT(Transformer):
    """u(z, r, t | y, omega, t_min, t_max), the average velocity from t back to r, and v(z, ...), the velocity at t.

    By default only h = t - r is embedded: the network sees t by the noise in z.

    Args:
        num_heads: of a block. mlp_hidden: width of its MLP.
        depth: blocks from the input to u; the last head_depth of them are u's own, and v has as many.
        v_head: whether there is a head for v: training needs it, sampling does not.
        checkpoint_blocks: compute each block a second time in backward, and keep only its inputs until then.
        The others are :class:`meanflow.model.transformer.Transformer`'s.
    """

    class_tokens: nn.Parameter
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        head_depth: int = 8,
        num_heads: int = 12,
        mlp_hidden: int = 2048,
        num_classes: int = 1000,
        time_embedding: tuple[str, ...] = ("h",),
        guidance_input: str = "interval",
        in_context: bool = True,
        v_head: bool = True,
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
            guidance_input=guidance_input,
            in_context=in_context,
            compute_dtype=compute_dtype,
        )
        self._add_embedders(("y", *self.time_embedding, *self.guidance), hidden_size)
        block = functools.partial(Block, hidden_size, num_heads, mlp_hidden, checkpoint_blocks, in_context)
        self.shared_blocks = nn.ModuleList(block() for _ in range(depth - head_depth))
        self._heads = "uv" if v_head else "u"
        for head in self._heads:
            self.add_module(f"{head}_heads", nn.ModuleList(block() for _ in range(head_depth)))
            self.add_module(f"{head}_final_layer", FinalLayer(hidden_size, patch_size, in_channels, in_context))
        self._head_dim = hidden_size // num_heads
        self.renew_position_table(self.dtype)
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self._anchor.dtype

    @property
    def _anchor(self) -> Tensor:
        """A parameter that no hook casts or moves away, if there is one."""
        return self.class_tokens if self.in_context else self.x_embedder.proj.weight

    @property
    def blocks(self) -> list[Block]:
        """All blocks: the shared ones and the heads'."""
        return [m for m in self.modules() if isinstance(m, Block)]

    def _shared(self) -> Iterable[nn.Module]:
        return self.shared_blocks

    def _own(self, head: str) -> tuple[Iterable[nn.Module], nn.Module]:
        return self.get_submodule(f"{head}_heads").children(), self.get_submodule(f"{head}_final_layer")

    def _final_layers(self) -> list[nn.Module]:
        return [self._own(head)[1] for head in self._heads]

    def _rotations(self) -> tuple[Tensor, Tensor]:
        return self.rope_cos, self.rope_sin

    @property
    def parameter_count(self) -> int:
        """Parameters, without the padding that MLPs are stored with."""
        padding = (x for m in self.modules() if isinstance(m, SwiGLU) for x in m.padding)
        return sum(p.numel() for p in self.parameters()) - sum(x.numel() for x in padding)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The official one: normal weights, Xavier uniform patches, norms of one, zeros for gates and last layers."""

        def normal(weight: Tensor, inputs: int, scale: float = 1.0) -> None:
            nn.init.normal_(weight, std=scale * inputs**-0.5, generator=generator)

        width = self.y_embedder.embedding_table.weight.shape[1]
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), generator=generator)
        nn.init.zeros_(self.x_embedder.proj.bias)
        normal(self.y_embedder.embedding_table.weight, width)
        for name in self.tokens:
            normal(getattr(self, f"{name}_tokens"), width)
        for module in self.modules():
            match module:
                case TimestepEmbedder():
                    for layer in (module.mlp[0], module.mlp[2]):
                        normal(layer.weight, layer.in_features)
                        nn.init.zeros_(layer.bias)
                case Attention():
                    for layer in (module.qkv, module.proj):
                        normal(layer.weight, width, BLOCK_STD)
                    nn.init.ones_(module.q_norm)
                    nn.init.ones_(module.k_norm)
                case SwiGLU():
                    normal(module.fc1.weight, width, BLOCK_STD)
                    normal(module.fc2.weight, module.mlp_hidden, BLOCK_STD)
                    for padding in module.padding:
                        padding.zero_()
                case Block():
                    nn.init.ones_(module.norm1)
                    nn.init.ones_(module.norm2)
                case FinalLayer():
                    nn.init.ones_(module.norm)
                    nn.init.zeros_(module.linear.weight)
                    nn.init.zeros_(module.linear.bias)
        for name, p in self.named_parameters():
            if "gate_m" in name or "adaLN_modulation" in name:
                nn.init.zeros_(p)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.renew_position_table(self.dtype)
        return self

    def renew_position_table(self, dtype: torch.dtype) -> None:
        """Compute the rotations again for weights of dtype, on their device: a cast one keeps the old dtype's rounding.

        They are in fp32 at least.
        """
        length = sum(self.tokens.values()) + (self.input_size // self.patch_size) ** 2
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = rope_table(length, self._head_dim, dtype=dtype, device=self._anchor.device)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)


def rope_table(
    length: int, head_dim: int, *, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (L, D / 2) of position theta^(-2 i / D), rounded once to dtype; the first token's position is 0."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angles = positions[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
