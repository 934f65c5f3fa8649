"""Convert checkpoints of networks built like SiT (.pt), as a start for fine-tuning or as MeanFlow models.

Three families share SiT's parameter names and differ in what time means and what is predicted:

    sit     facebookresearch's and willisma's SiT: flow matching; data at time 1; predicts data minus noise
    dit     DiT: diffusion; steps 0 to 999, noise at 999; predicts the noise
    zhuyu   zhuyu-cs/MeanFlow: MeanFlow; noise at time 1, as here; t and t - r are embedded, the latter by "r_embedder"
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from meanflow_kernels import timestep_embedding

from ..config import ModelConfig
from ..errors import UserError, require
from ..model.dit import TIME_STD, position_table
from ..model.pairs import TIME_FEATURES
from ..recipe import DIT_SIZES
from ..storage.foreign import nearest

FAMILIES = ("sit", "dit", "zhuyu")
DIT_STEPS, DIT_BETAS = 1000, (1e-4, 0.02)
FIT_CUTOFF = 1e-3
"""Cut-off of DiT's fit, relative to the strongest direction of the time features: weaker ones would need large
weights."""


def infer_model(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> ModelConfig:
    """Infer the shape of a network from its state dict.

    Args:
        state: of a DiT here, or in SiT's names. num_heads: where depth and width are no official size's.
            input_size: of the latents, where there is no table of positions to tell it (32 is ImageNet's at 256).

    Raises:
        UserError: for what is no such network, or where the heads cannot be told.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / width
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
    except (KeyError, ValueError, IndexError) as error:
        name = error.args[0] if isinstance(error, KeyError) else "blocks.0.mlp.fc1.weight"
        got = f"no {name}, nearest to it {nearest(name, state)}"
        raise UserError(f"checkpoint: got {got}, wanted the tensors of a DiT or SiT; name another") from None
    known = {(size[0], size[1]): size[2] for size in DIT_SIZES.values()}
    heads = num_heads or known.get((depth, width))
    wanted = f"the attention heads, which depth {depth} and width {width} do not tell"
    require(heads is not None, "num_heads", None, wanted, "name them by --num-heads")
    if "pos_embed" in state:
        input_size = patch * round(state["pos_embed"].shape[1] ** 0.5)
    times = ",".join(t for t in "trh" if f"{t}_embedder.mlp.0.weight" in state)
    config = ModelConfig(depth, width, heads, patch, input_size or 32, channels, classes, mlp_ratio)
    return config if times in ("t", "") else ModelConfig(**vars(config) | {"time_embedding": times})


def from_sit(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert SiT's velocity field to a MeanFlow that equals it for every r: u(z, r, t) = v(z, t), exactly.

    SiT's time s is 1 - t and its velocity points to the data. cos and sin of (1 - t) f are sums of those of t f, so the
    first layer of the time embedding takes the turn, in fp64; the last layer takes the sign. What is new, the embedding
    of t - r, ends in zeros.

    Args:
        state: of SiT, whose second half of outputs (learn_sigma), which it never uses, is left out.

    Raises:
        UserError: for another network.
    """
    tensors, config = _common(state, num_heads)
    _turn_time(tensors)
    for leaf in ("weight", "bias"):
        tensors[f"final_layer.linear.{leaf}"] = -tensors[f"final_layer.linear.{leaf}"]
    return tensors | _silent_embedding("h_embedder", tensors), config


def from_dit(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[dict[str, Tensor], ModelConfig, float]:
    """Convert DiT's weights to a start; DiT is no flow-matching model and cannot be made one.

    It predicts the noise e, where e - x is wanted, for inputs scaled to unit variance. All weights are taken but the
    halves of the outputs that are variances, and the time embedding's first layer: DiT's 1000 steps are cosines and
    sines of up to 1000 t, ours of up to t. It is fitted, by least squares, to what DiT's gives at the step of the same
    ratio of noise to signal. The embedding of t - r is new and ends in zeros.

    Returns:
        tensors, shape, and the relative error of that fit.
    """
    tensors, config = _common(state, num_heads)
    error = _fit_time(tensors)
    return tensors | _silent_embedding("h_embedder", tensors), config, error


def from_zhuyu(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert a MeanFlow of zhuyu-cs's code, whose "r_embedder" embeds t - r; older ones embed both times by one MLP.

    Raises:
        UserError: for another network.
    """
    gap = "r_embedder" if "r_embedder.mlp.0.weight" in state else "t_embedder"
    tensors, config = _common({k: x for k, x in state.items() if not k.startswith("r_embedder")}, num_heads)
    embedding = {k: x for k, x in state.items() if k.startswith(f"{gap}.")}
    return tensors | {k.replace(gap, "h_embedder"): x.clone() for k, x in embedding.items()}, config


def to_zhuyu(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Invert :func:`from_zhuyu`, for networks that embed t and h = t - r.

    Raises:
        UserError: for networks that embed other times.
    """
    wanted = "t,h, which that code embeds"
    require(
        config.time_embedding == "t,h", "model.time_embedding", config.time_embedding, wanted, "it has no place there"
    )
    table = position_table(config.hidden_size, config.input_size // config.patch_size, dtype=torch.float32)
    return {"pos_embed": table[None]} | {k.replace("h_embedder", "r_embedder"): x for k, x in tensors.items()}


def _common(state: Mapping[str, Tensor], num_heads: int | None) -> tuple[dict[str, Tensor], ModelConfig]:
    """Convert and check what all families share: names, positions, the first half of doubled outputs."""
    config = infer_model(state, num_heads=num_heads)
    tensors = {name: x.clone() for name, x in state.items() if name != "pos_embed"}
    strange = [name for name in tensors if ".q_norm." in name or ".k_norm." in name or "projectors" in name]
    require(not strange, "checkpoint", strange[:1], "SiT's or DiT's own layers", "this network has others")
    if "pos_embed" in state:
        grid = config.input_size // config.patch_size
        table = position_table(config.hidden_size, grid, dtype=torch.float64)
        off = float((state["pos_embed"][0].double() - table).abs().max())
        require(
            off < 1e-4 + _rounding(state["pos_embed"]),
            "pos_embed",
            f"{off:.2g} away",
            "DiT's table of positions",
            "this network has another",
        )
    one = config.patch_size**2 * config.in_channels
    for leaf in ("weight", "bias"):
        x = tensors[f"final_layer.linear.{leaf}"]
        require(len(x) in (one, 2 * one), "final_layer", len(x), f"{one} or {2 * one} outputs", "name another")
        # a token's outputs run over its pixels, and over the channels fastest
        x = x.unflatten(0, (config.patch_size**2, -1))[:, : config.in_channels]
        tensors[f"final_layer.linear.{leaf}"] = x.flatten(0, 1).contiguous()
    return tensors, config


def _rounding(x: Tensor) -> float:
    """Rounding error of numbers up to 1 in the coarsest precision that represents a tensor exactly."""
    halves = (torch.bfloat16, torch.float16)
    dtype = next((half for half in halves if torch.equal(x.to(half).to(x.dtype), x)), torch.float32)
    return torch.finfo(dtype).eps / 4  # half a unit in the last place of numbers from 0.5 to 1


def _silent_embedding(name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make a time embedding that is zero until it is trained, with fixed weights so that a conversion repeats."""
    first, last = like["t_embedder.mlp.0.weight"], like["t_embedder.mlp.2.weight"]
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.mlp.0.weight": TIME_STD * torch.randn(first.shape, generator=generator).to(first.dtype),
        f"{name}.mlp.0.bias": torch.zeros(len(first), dtype=first.dtype),
        f"{name}.mlp.2.weight": torch.zeros_like(last),
        f"{name}.mlp.2.bias": torch.zeros(len(last), dtype=last.dtype),
    }


def _turn_time(tensors: dict[str, Tensor]) -> None:
    """Convert the first layer of a time embedding to 1 - t in place of t."""
    name = "t_embedder.mlp.0.weight"
    weight = tensors[name]
    cosines, sines = weight.double().chunk(2, 1)
    # cos(f - a) = cos f cos a + sin f sin a;  sin(f - a) = sin f cos a - cos f sin a
    one = timestep_embedding(torch.ones(1, dtype=torch.float64), TIME_FEATURES)
    cos_f, sin_f = one.chunk(2, 1)
    turned = torch.cat([cosines * cos_f + sines * sin_f, cosines * sin_f - sines * cos_f], 1)
    tensors[name] = turned.to(weight.dtype)


def _fit_time(tensors: dict[str, Tensor]) -> float:
    """Fit the first layer of DiT's time embedding for t in [0, 1] by least squares; returns the relative error, too."""
    signal = np.cumprod(1 - np.linspace(*DIT_BETAS, DIT_STEPS))
    noise, kept = np.sqrt(1 - signal), np.sqrt(signal)
    t = torch.from_numpy(noise / (noise + kept))  # t / (1 - t) is the step's ratio of noise to signal
    name = "t_embedder.mlp.0.{}"
    weight, bias = (tensors[name.format(leaf)] for leaf in ("weight", "bias"))
    steps = torch.arange(DIT_STEPS, dtype=torch.float64)
    wanted = timestep_embedding(steps, TIME_FEATURES) @ weight.double().T + bias.double()
    features = torch.nn.functional.pad(timestep_embedding(t, TIME_FEATURES), (0, 1), value=1.0)
    fitted = torch.linalg.pinv(features, rtol=FIT_CUTOFF) @ wanted
    tensors[name.format("weight")] = fitted[:-1].T.to(weight.dtype).contiguous()
    tensors[name.format("bias")] = fitted[-1].to(bias.dtype)
    return float((features @ fitted - wanted).norm() / wanted.norm())
