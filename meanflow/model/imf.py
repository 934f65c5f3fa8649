"""The transformer of improved MeanFlow, written once on (primal, tangent) pairs.

Letters: B batch, L tokens, C model width, H heads, D head width, p patch. Conditions enter as tokens before those of
the patches; blocks are pre-norm with RMSNorm, SwiGLU, QK-norm and rotary positions, and each branch ends with a learned
gate that starts at zero. After shared blocks the stream goes through the blocks of a head for u, the average velocity,
and of one for v, the instantaneous one (improved MeanFlow, arXiv 2512.02012; the architecture is Lyy-iiis/imeanflow's).
Names are DiT's.
"""

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from meanflow_kernels import attention_jvp, gate_rmsnorm_jvp, qk_rope_jvp, rmsnorm_jvp, swiglu_jvp
from meanflow_kernels.dual import forbid_gradient

from .copies import keep_copies
from .dit import LabelEmbedder, Residual, TimestepEmbedder, checkpointed, unpatchify
from .pairs import Dual, Linear, PatchEmbed, apply_dual

TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
"""Tokens of each condition, in the order of the sequence, before the patches."""
ROPE_THETA = 10_000.0
BLOCK_STD = 0.32
"""Standard deviation of a block's weights, over the root of the layer's inputs."""
ALIGNMENT = 16
"""Columns that an MLP's hidden width is a multiple of, as its rows are stored: 2,730 become 2,736."""

Head = Literal["u", "v", "uv"]


def _norm(residual: Residual, weight: Tensor, dtype: torch.dtype) -> tuple[Dual, Dual]:
    """The stream added up (B, L, C), and its RMSNorm with a weight (C,), in dtype."""
    if residual.branch is None:
        return residual.x, apply_dual(rmsnorm_jvp, residual.x, weight=weight, out_dtype=dtype)
    gate = residual.gate.primal
    return apply_dual(gate_rmsnorm_jvp, residual.x, residual.branch, gate=gate, weight=weight, out_dtype=dtype)


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
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)), the gates learned vectors."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden: int, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.norm1, self.norm2, self.gate_msa, self.gate_mlp = (
            nn.Parameter(torch.empty(hidden_size)) for _ in range(4)
        )
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, mlp_hidden)

    def forward(self, residual: Residual, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Residual:
        """residual of (B, L, C); cos and sin (L, D / 2); dtype of the matrix products."""
        branches = functools.partial(self._branches, cos=cos, sin=sin, dtype=dtype)
        # inside the block, so that its hooks (FSDP's) run once a pass
        if self.checkpointed and torch.is_grad_enabled():
            return checkpointed(branches, residual, None)
        return branches(residual, None)

    def _branches(self, residual: Residual, _: None, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Residual:
        x, h = _norm(residual, self.norm1, dtype)
        x, h = _norm(Residual(x, self.attn(h, cos, sin), Dual(self.gate_msa)), self.norm2, dtype)
        # a copy: the next block adds the branch, when this one's parameters may be gone (FSDP)
        return Residual(x, self.mlp(h), Dual(self.gate_mlp.clone()))


class FinalLayer(nn.Module):
    """The last RMSNorm and the projection to pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(hidden_size))
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)

    def forward(self, residual: Residual, dtype: torch.dtype) -> Dual:
        """residual of (B, L, C) -> (B, L, p p channels)."""
        _, h = _norm(residual, self.norm, dtype)
        return self.linear(h)


class ImfDiT(nn.Module):
    """u(z, r, t | y, omega, t_min, t_max), the average velocity from t back to r, and v(z, ...), the velocity at t.

    Only h = t - r is embedded: the network sees t by the noise in z.

    Args:
        input_size: height and width of the latents. patch_size: p. in_channels: channels of the latents.
        hidden_size, num_heads: the transformer. mlp_hidden: width of its MLPs.
        depth: blocks from the input to u; the last head_depth of them are u's own, and v has as many.
        num_classes: classes without the null class, whose label is ``num_classes``.
        v_head: whether there is a head for v: training needs it, sampling does not.
        compute_dtype: dtype of matrix products and attention; None is the parameters' dtype. The residual stream, the
            norms' statistics, time features and the outputs keep the parameters' dtype.
        checkpoint_blocks: compute each block a second time in backward, and keep only its inputs until then.
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
        v_head: bool = True,
        compute_dtype: torch.dtype | None = None,
        checkpoint_blocks: bool = False,
    ):
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes = num_classes
        self.compute_dtype = compute_dtype
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        for name in ("h", "omega", "t_min", "t_max"):
            self.add_module(f"{name}_embedder", TimestepEmbedder(hidden_size))
        for name, count in TOKENS.items():
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.empty(count, hidden_size)))

        def blocks(count: int) -> nn.ModuleList:
            sizes = (hidden_size, num_heads, mlp_hidden)
            return nn.ModuleList(Block(*sizes, checkpoint_blocks) for _ in range(count))

        self.shared_blocks = blocks(depth - head_depth)
        for head in "uv" if v_head else "u":
            self.add_module(f"{head}_heads", blocks(head_depth))
            self.add_module(f"{head}_final_layer", FinalLayer(hidden_size, patch_size, in_channels))
        self._head_dim = hidden_size // num_heads
        self.renew_position_table(self.dtype)
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.class_tokens.dtype

    @property
    def blocks(self) -> list[Block]:
        """All blocks: the shared ones and the heads'."""
        return [m for m in self.modules() if isinstance(m, Block)]

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

        width = self.class_tokens.shape[1]
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1), generator=generator)
        nn.init.zeros_(self.x_embedder.proj.bias)
        normal(self.y_embedder.embedding_table.weight, width)
        for name in TOKENS:
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
                    for norm, gate in ((module.norm1, module.gate_msa), (module.norm2, module.gate_mlp)):
                        nn.init.ones_(norm)
                        nn.init.zeros_(gate)
                case FinalLayer():
                    nn.init.ones_(module.norm)
                    nn.init.zeros_(module.linear.weight)
                    nn.init.zeros_(module.linear.bias)

    def make_copies(self) -> list[Tensor | None]:
        """Keep the weights of the linear layers in compute_dtype too, for an optimizer to keep up to date.

        Returns:
            The copies in the order of parameters(), None for a parameter without one.
        """
        copies = keep_copies(self)
        return [copies.get(p) for p in self.parameters()]

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
            z: noised latents (B, channels, size, size). r, t: times (B,), 0 <= r <= t <= 1. y: labels (B,), int64.
            omega: guidance scales (B,), 1 by default. t_min, t_max: where guidance acts (B,), [0, 1] by default.
            head: whose blocks run.
            tangents: direction (z_dot, r_dot, t_dot) for the samples that need it; an entry None is zero. No gradient
                flows through it. It runs through the shared blocks and u's.
            tangent_start: the first sample that has a tangent, where not the whole batch has one.
            dtype: of products and attention in this call, instead of compute_dtype.

        Returns:
            u, v or (u, v), shaped like z; with tangents, (u, u_dot) or (u, v, u_dot), where u_dot has a row for each
            row of the tangents.
        """
        dtype = dtype or self.compute_dtype or self.dtype
        z_dot, r_dot, t_dot = tangents or (None, None, None)
        h = Dual(t, t_dot, tangent_start) + Dual(r, r_dot, tangent_start).map(torch.neg)
        patches = self.x_embedder(Dual(z, z_dot, tangent_start), dtype).to(self.dtype)  # (B, grid^2, C)
        omega = torch.ones_like(t) if omega is None else omega
        t_min = torch.zeros_like(t) if t_min is None else t_min
        t_max = torch.ones_like(t) if t_max is None else t_max
        residual = Residual(self._with_conditions(patches, h, y, omega, t_min, t_max, dtype))  # (B, L, C)
        for block in self.shared_blocks:
            residual = block(residual, self.rope_cos, self.rope_sin, dtype)
        outputs, u_dot = [], None
        if "u" in head:
            u, u_dot, _ = self._head(self.u_heads, self.u_final_layer, residual, dtype)
            outputs.append(u)
        if "v" in head:
            primals = Residual(*(None if x is None else Dual(x.primal) for x in residual))
            outputs.append(self._head(self.v_heads, self.v_final_layer, primals, dtype).primal)
        if tangents is not None:
            outputs.append(forbid_gradient(u_dot, outputs[0]))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _with_conditions(
        self, patches: Dual, h: Dual, y: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, dtype: torch.dtype
    ) -> Dual:
        """Tokens of the conditions before those of the patches (B, L, C): learned ones plus the condition's vector."""
        times = {"omega": 1 - 1 / omega, "t_min": t_min, "t_max": t_max}
        vectors = {"class": self.y_embedder(y)}  # (B, C)
        for name, time in times.items():
            vectors[name] = self.get_submodule(f"{name}_embedder")(Dual(time), dtype).primal.to(self.dtype)
        h = self.h_embedder(h, dtype).to(self.dtype)
        vectors["time"] = h.primal
        tokens = [getattr(self, f"{name}_tokens") + vectors[name][:, None] for name in TOKENS]
        primal = torch.cat([*tokens, patches.primal], 1)
        if h.tangent is None and patches.tangent is None:
            return Dual(primal)
        start, n = next((x.tangent_start, len(x.tangent)) for x in (h, patches) if x.tangent is not None)
        tangent = primal.new_zeros(n, *primal.shape[1:])
        before, count = primal.shape[1] - patches.primal.shape[1], TOKENS["time"]
        parts = [tangent[:, : before - count], tangent[:, before - count : before], tangent[:, before:]]
        if h.tangent is not None:
            parts[1] = h.tangent[:, None].expand(-1, count, -1)
        if patches.tangent is not None:
            parts[2] = patches.tangent
        return Dual(primal, torch.cat(parts, 1), start)

    def _head(self, blocks: nn.ModuleList, final_layer: FinalLayer, residual: Residual, dtype: torch.dtype) -> Dual:
        """A velocity like the latents (B, channels, size, size)."""
        for block in blocks:
            residual = block(residual, self.rope_cos, self.rope_sin, dtype)
        grid = self.input_size // self.patch_size
        x, branch, gate, _ = residual
        x, branch = (None if a is None else a.map(lambda b: b[:, -grid * grid :]) for a in (x, branch))
        out = final_layer(Residual(x, branch, gate), dtype).to(self.dtype)
        return out.map(lambda a: unpatchify(a, self.patch_size, grid))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.renew_position_table(self.dtype)
        return self

    def renew_position_table(self, dtype: torch.dtype) -> None:
        """Compute the rotations again for weights of dtype, on their device: a cast one keeps the old dtype's rounding.

        They are in fp32 at least.
        """
        length = sum(TOKENS.values()) + (self.input_size // self.patch_size) ** 2
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = rope_table(length, self._head_dim, dtype=dtype, device=self.class_tokens.device)
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
