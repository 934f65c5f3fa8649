"""The networks as diffusers models: saved to a folder, loaded from one, in any dtype."""

from dataclasses import asdict
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..errors import require
from ..model.dit import DiT
from ..model.imf import ImfDiT
from ..recipe import IMF_HEAD_DEPTH, IMF_OPTIONS, GuidanceInput, ModelConfig

ALIGNED = 64
"""Alignment of torch's CPU tensors in bytes."""


class _Model(ModelMixin, ConfigMixin):
    """What both networks have as diffusers models."""

    model_config: ModelConfig
    """The network's shape."""
    guidance_input: GuidanceInput = "none"
    """What it is told of its guidance."""

    _supports_gradient_checkpointing = True
    # a few small layers whose rounding the whole image shows
    _skip_layerwise_casting_patterns = ["embedder", "final_layer"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as diffusers does; the positions' table, which no file holds, is computed for the weights' dtype.

        Raises:
            UserError: for a file that lacks weights, or has unknown ones.
        """
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing, unknown = (sorted(info.get(f"{kind}_keys", ())) for kind in ("missing", "unexpected"))
        got = f"no {missing[:2]}, and unknown {unknown[:2]}"
        require(not (missing or unknown), "transformer", got, "a whole network", "save it from the plain model")
        model.renew_position_table(model.x_embedder.proj.weight.dtype)
        for p in model.parameters():
            # a mapped file's tensors lie anywhere, and a CPU's products of those round differently
            if p.device.type == "cpu" and p.data_ptr() % ALIGNED:
                p.data = p.data.clone()
        return (model, info) if asked else model

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether backward recomputes each block instead of keeping its activations."""
        return any(block.checkpointed for block in self.blocks)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward, by the network's own checkpointing, which handles tangents."""
        for block in self.blocks:
            block.checkpointed = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep each block's activations."""
        for block in self.blocks:
            block.checkpointed = False

    def _labels(self, class_labels: Tensor | None, z: Tensor) -> Tensor:
        """The labels, or the null class for all of z (B, ...)."""
        if class_labels is not None:
            return class_labels
        return torch.full((len(z),), self.model_config.num_classes, device=z.device)


class _Call:
    """The networks' forward, under diffusers' names for inputs and outputs."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | None = None,
        guidance_start: Tensor | None = None,
        guidance_end: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The average velocity from timestep t back to r.

        Args:
            hidden_states: z (B, channels, size, size). timestep, r_timestep: t and r (B,) in [0, 1], r <= t, best in
                fp32 whatever the model's dtype. class_labels: (B,), int64; None is the null class for all.
            guidance_scale, guidance_start, guidance_end: omega and the times where guidance begins and ends (B,), best
                in fp32, where the network embeds them; by default there is none.

        Returns:
            An output whose sample is u, shaped like z, in the model's dtype; or a tuple of it.
        """
        labels, guidance = self._labels(class_labels, hidden_states), (guidance_scale, guidance_start, guidance_end)
        u = super().forward(hidden_states, r_timestep, timestep, labels, *guidance)
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)


class MeanFlowTransformer2DModel(_Call, DiT, _Model):
    """:class:`meanflow.model.dit.DiT` without a head for v, which sampling does not need.

    The parameters are those of :class:`meanflow.config.ModelConfig`, and the state dict is DiT's.

    Raises:
        ValueError: for parameters that ModelConfig refuses.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        time_embedding: str = "t,h",
        head_depth: int = 0,
        conditioning: Literal["adaln", "in_context"] = "adaln",
        guidance_input: GuidanceInput = "none",
    ):
        model = ModelConfig(
            depth, hidden_size, num_heads, patch_size, input_size, in_channels, num_classes, mlp_ratio, time_embedding,
            head_depth=head_depth, conditioning=conditioning, guidance_input=guidance_input,
        )  # fmt: skip
        super().__init__(**model.options | {"head_depth": 0})
        self.model_config, self.guidance_input = model, guidance_input
        self.register_state_dict_post_hook(_with_what_is_offloaded)


class ImfTransformer2DModel(_Call, ImfDiT, _Model):
    """:class:`meanflow.model.imf.ImfDiT` without its head for v, which sampling does not need.

    The parameters are those of :class:`meanflow.config.ModelConfig`, and what the network is told of its guidance.

    Raises:
        ValueError: for parameters that ModelConfig refuses.
    """

    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(
        self,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        mlp_ratio: float = 8 / 3,
        head_depth: int = IMF_HEAD_DEPTH,
        guidance_input: GuidanceInput = "interval",
    ):
        sizes = (depth, hidden_size, num_heads, patch_size, input_size, in_channels, num_classes)
        model = ModelConfig(*sizes, **IMF_OPTIONS | {"mlp_ratio": mlp_ratio, "head_depth": head_depth})
        super().__init__(**model.options | {"v_head": False})
        self.model_config, self.guidance_input = model, guidance_input
        self.register_state_dict_post_hook(_with_what_is_offloaded)


Transformer = MeanFlowTransformer2DModel | ImfTransformer2DModel


def make_transformer(model: ModelConfig, guidance_input: GuidanceInput) -> Transformer:
    """Make the model of a network, on the CPU.

    guidance_input: what the network is told of its guidance.

    Raises:
        UserError: for blocks of improved MeanFlow with other conditions than its own.
    """
    values = asdict(model)
    hint = "sample from the run itself"
    own = {name: values.pop(name) for name in ("time_scale", "log_variance")}
    require(own == {"time_scale": 1, "log_variance": False}, "model", own, "1 and False for a pipeline", hint)
    if model.network == "dit":
        return MeanFlowTransformer2DModel(**{name: x for name, x in values.items() if name != "network"})
    wanted = "improved MeanFlow's own network, or a DiT, for a pipeline"
    require(not model.beyond_imf, "model", model.beyond_imf, wanted, hint)
    names = values.keys() - IMF_OPTIONS.keys() | {"mlp_ratio"}
    return ImfTransformer2DModel(**{name: values[name] for name in names}, guidance_input=guidance_input)


def _with_what_is_offloaded(model: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    """Add to a state dict the weights that accelerate's hooks hold while their layers are not in use."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            for leaf in module._parameters if getattr(each, "weights_map", None) is not None else ():
                key = f"{prefix}{name}.{leaf}" if name else f"{prefix}{leaf}"
                if state[key].is_meta:
                    state[key] = each.weights_map[leaf]
