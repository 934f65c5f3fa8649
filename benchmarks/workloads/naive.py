"""The step as public PyTorch trainers write it: what the planned step on pairs is held against.

A plain DiT (Peebles & Xie, arXiv 2212.09748) of torch's own layers under autocast, whose attention is written out,
because no fused one has forward-mode AD; torch.func.jvp and each guidance forward on the whole batch. (SDPA's math
backend computes 16-bit attention in fp32, and its backward under autocast and func.jvp fails on a GPU.)
torch's forward-mode AD multiplies the zero tangent of a linear layer's weight too: its derivative costs two products
where one is needed, eager and compiled, so that the step with kappa is 7 forwards and not 6.
Parameters are named as in meanflow.model.dit: one's state_dict is the other's.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meanflow.config import ModelConfig, ObjectiveConfig


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, L, C), shift and scale (B, C)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, L, C)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, features: int = 256):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=t.dtype, device=t.device))
        angles = t[:, None] * frequencies[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (B, C)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (B, C)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D)
        o = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B, L, p p channels)


class NaiveDiT(nn.Module):
    """u(z, r, t | y), like meanflow.model.dit.DiT without its tangents; the weights are to be loaded from one.

    Args:
        config: of the network. compute_dtype: of autocast; None is no autocast.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.patch_size, self.num_classes, self.compute_dtype = config.patch_size, config.num_classes, compute_dtype
        self.times = config.time_embedding.split(",")
        width, grid = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config)
        for time in self.times:
            self.add_module(f"{time}_embedder", TimestepEmbedder(width))
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(DiTBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.in_channels)
        self.register_buffer("pos_embed", sincos_positions(width, grid), persistent=False)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """z (B, channels, size, size), times r and t (B,), labels y (B,) -> u, shaped like z."""
        with torch.autocast(z.device.type, self.compute_dtype, enabled=self.compute_dtype is not None):
            times = {"t": t, "r": r, "h": t - r}
            c = self.y_embedder(y)
            for time in self.times:
                c = c + self.get_submodule(f"{time}_embedder")(times[time])
            x = self.x_embedder(z) + self.pos_embed
            for block in self.blocks:
                x = block(x, c)
            return unpatchify(self.final_layer(x, c), self.patch_size)


def unpatchify(x: Tensor, p: int) -> Tensor:
    """x (B, L, p p channels) -> (B, channels, size, size)."""
    grid = math.isqrt(x.shape[1])
    x = x.reshape(x.shape[0], grid, grid, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(x.shape[0], -1, grid * p, grid * p)


def sincos_positions(width: int, grid: int) -> Tensor:
    """MAE's table (grid^2, width) in the default dtype: sines and cosines of the column, then of the row."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).to(torch.get_default_dtype())


class NaiveTerms(NamedTuple):
    loss: Tensor
    u: Tensor
    du_dt: Tensor


def refuse_others(config: ObjectiveConfig, **wanted: object) -> None:
    """Raise ValueError for an option that the naive step does not compute, and for guidance by other weights."""
    for name, value in (wanted | {"guidance_weights": "current"}).items():
        got = getattr(config, name)
        if got != value:
            raise ValueError(f"{name}: got {got!r}, wanted {value!r}; the naive step computes no other")


def naive_terms(
    config: ObjectiveConfig,
    net: NaiveDiT,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    drop: Tensor,
) -> NaiveTerms:
    """MeanFlow's loss (arXiv 2505.13447, Algorithm 1 and appendix B), every pass on every sample.

    Args:
        x, e: data and noise (B, channels, size, size). r, t: times (B,). y: labels (B,). drop: (B,) bool, who trains
            on the null class. To be compiled, x, e, r and t must not be views of one packed tensor: torch 2.13 fails
            on them under torch.func.jvp with an internal assert.

    Raises:
        ValueError: for guidance by other weights than the net's, and for a predicted direction or drawn guidance.
    """
    refuse_others(config, direction="guided", guidance_input="none")

    def column(a):
        return a.view(-1, 1, 1, 1)

    z = (1 - column(t)) * x + column(t) * e
    v = v_g = e - x
    if config.guided:
        with torch.no_grad():
            u_null = net(z, t, t, torch.full_like(y, net.num_classes))
            v_g = config.omega * v + (1 - config.omega - config.kappa) * u_null
            if config.kappa:
                v_g = v_g + config.kappa * net(z, t, t, y)
            guided = (t >= config.guidance_start) & (t <= config.guidance_end)
            if not config.guide_dropped:
                guided = guided & ~drop
            v_g = torch.where(column(guided), v_g, v)

    y = torch.where(drop, net.num_classes, y)
    direction = (v_g, *(torch.full_like(t, rate) for rate in config.tangent))
    u, du_dt = torch.func.jvp(lambda z, r, t: net(z, r, t, y), (z, r, t), direction)
    gap = (t - r).clamp(0, 1) if config.clip_gap else t - r
    u_tgt = (v_g - column(gap) * du_dt).detach()
    raw = (u - u_tgt).pow(2).flatten(1).sum(1)
    loss = (raw / (raw.detach() + config.norm_c) ** config.norm_p).mean()
    return NaiveTerms(loss, u.detach(), du_dt.detach())
