"""Improved MeanFlow's step as one writes it without a plan: its network in plain torch, every pass on the whole batch.

As fair as `naive.py` is: blocks of torch's own operations under autocast, positions turned by real arithmetic, and only
what is used is computed. A guidance pass runs the head for v alone, and the derivative stops at u: torch.func.jvp hands
out the shared stream without its tangent, which the head for v then takes. The official program (Lyy-iiis/imeanflow)
predicts v_c twice, first with the drawn scale, then with that of the interval, which are the same number wherever the
first one is used; here it is predicted once.
Parameters are named as in meanflow.model.imf, and stored with the same padding: one's state_dict is the other's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.method.guidance import GuidanceInputs

from .naive import LabelEmbedder, NaiveTerms, PatchEmbed, TimestepEmbedder, refuse_others, unpatchify

TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
"""Tokens of each condition, which come before the patches."""
PADDED = 16
"""The hidden width is stored in multiples of it, beyond which weights are zero."""


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., C) in fp32 or above, weight (C,)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, H, L, D) by the angles of their position, cos and sin (L, D / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def angles(length: int, head_dim: int) -> Tensor:
    """Position times theta^(-2 i / D), theta 10,000 (L, D / 2), in fp64."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_norm, self.k_norm = (nn.Parameter(torch.empty(hidden_size // num_heads)) for _ in range(2))
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D)
        q, k = (rotate(rms_norm(a, weight), cos, sin) for a, weight in ((q, self.q_norm), (k, self.k_norm)))
        o = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, mlp_hidden: int):
        super().__init__()
        stored = -(-mlp_hidden // PADDED) * PADDED
        self.fc1 = nn.Linear(hidden_size, 2 * stored, bias=False)
        self.fc2 = nn.Linear(stored, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        for name in ("norm1", "norm2", "gate_msa", "gate_mlp"):
            self.register_parameter(name, nn.Parameter(torch.empty(config.hidden_size)))
        self.attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.gate_msa * self.attn(rms_norm(x, self.norm1), cos, sin)
        return x + self.gate_mlp * self.mlp(rms_norm(x, self.norm2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(hidden_size))
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(rms_norm(x, self.norm))  # (B, L, p p channels)


class NaiveImfDiT(nn.Module):
    """u and v of (z, r, t | y, omega, t_min, t_max), like meanflow.model.imf.ImfDiT without its tangents; the weights
    are to be loaded from one.

    Args:
        config: of the network. compute_dtype: of autocast; None is no autocast.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None):
        super().__init__()
        self.patch_size, self.num_classes, self.compute_dtype = config.patch_size, config.num_classes, compute_dtype
        width = config.hidden_size
        for name, count in TOKENS.items():
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.empty(count, width)))
        self.x_embedder = PatchEmbed(config)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        for name in ("h", "omega", "t_min", "t_max"):
            self.add_module(f"{name}_embedder", TimestepEmbedder(width))
        self.shared_blocks = nn.ModuleList(Block(config) for _ in range(config.depth - config.head_depth))
        for head in "uv" if config.head_depth else "u":
            self.add_module(f"{head}_heads", nn.ModuleList(Block(config) for _ in range(config.head_depth)))
            self.add_module(f"{head}_final_layer", FinalLayer(width, config.patch_size**2 * config.in_channels))
        turns = angles(sum(TOKENS.values()) + config.tokens, width // config.num_heads)
        for name, table in (("cos", turns.cos()), ("sin", turns.sin())):
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def autocast(self, z: Tensor) -> torch.autocast:
        return torch.autocast(z.device.type, self.compute_dtype, enabled=self.compute_dtype is not None)

    def shared(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        y: Tensor,
        omega: Tensor | None = None,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
    ) -> Tensor:
        """The stream behind the shared blocks (B, L, C), of z (B, channels, size, size) and conditions (B,)."""
        omega = torch.ones_like(t) if omega is None else omega
        t_min = torch.zeros_like(t) if t_min is None else t_min
        t_max = torch.ones_like(t) if t_max is None else t_max
        with self.autocast(z):
            conditions = {
                "class": self.y_embedder(y),
                "omega": self.omega_embedder(1 - 1 / omega),
                "t_min": self.t_min_embedder(t_min),
                "t_max": self.t_max_embedder(t_max),
                "time": self.h_embedder(t - r),
            }  # fmt: skip
            tokens = [getattr(self, f"{name}_tokens") + conditions[name][:, None] for name in TOKENS]
            x = torch.cat([*tokens, self.x_embedder(z).to(z.dtype)], 1)
            for block in self.shared_blocks:
                x = block(x, self.cos, self.sin)
        return x

    def head(self, name: str, x: Tensor) -> Tensor:
        """The velocity u or v of the shared stream, shaped like z."""
        with self.autocast(x):
            for block in getattr(self, f"{name}_heads"):
                x = block(x, self.cos, self.sin)
            x = x[:, sum(TOKENS.values()) :]
            return unpatchify(getattr(self, f"{name}_final_layer")(x), self.patch_size)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, y: Tensor, *told: Tensor, head: str = "u") -> Tensor:
        """z (B, channels, size, size), the rest (B,) -> u or v, shaped like z; told: omega, t_min, t_max."""
        return self.head(head, self.shared(z, r, t, y, *told))


def naive_imf_terms(
    config: ObjectiveConfig,
    net: NaiveImfDiT,
    x: Tensor,
    e: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    drop: Tensor,
    guidance: GuidanceInputs,
) -> NaiveTerms:
    """Improved MeanFlow's loss (arXiv 2512.02012), every pass on every sample.

    Args:
        x, e, r, t, y, drop: as for `naive.naive_terms`. guidance: the drawn scale and interval of each sample.

    Raises:
        ValueError: for another objective.
    """
    refuse_others(config, direction="v_head", guidance_input="interval", guide_dropped=False, tangent=(0.0, 1.0))
    omega, start, end = guidance

    def column(a):
        return a.view(-1, 1, 1, 1)

    z = (1 - column(t)) * x + column(t) * e
    v_t = e - x
    with torch.no_grad():
        scale = torch.where((start <= t) & (t <= end), omega, 1)
        one, always = torch.ones_like(t), (torch.zeros_like(t), torch.ones_like(t))
        v_c = net(z, t, t, y, scale, *always, head="v")
        v_null = net(z, t, t, torch.full_like(y, net.num_classes), one, *always, head="v")
        v_g = torch.where(column(drop), v_t, v_t + (1 - 1 / column(scale)) * (v_c - v_null))

    y = torch.where(drop, net.num_classes, y)

    def average(z, r, t):
        stream = net.shared(z, r, t, y, omega, start, end)
        return net.head("u", stream), stream

    direction = (v_c, torch.zeros_like(r), torch.ones_like(t))
    u, du_dt, stream = torch.func.jvp(average, (z, r, t), direction, has_aux=True)
    v = net.head("v", stream)
    loss = 0.0
    for velocity in (u + column(t - r) * du_dt.detach(), v):
        raw = (velocity - v_g).pow(2).flatten(1).sum(1)
        loss = loss + raw / (raw.detach() + config.norm_c) ** config.norm_p
    return NaiveTerms(loss.mean(), u.detach(), du_dt.detach())
