"""The network as a diffusers model: saved to a folder, loaded from one, in any dtype."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import require
from ..model.dit import DiT
from .formats import dit_options

ALIGNED = 64
"""Alignment of torch's CPU tensors in bytes."""


class MeanFlowTransformer2DModel(DiT, ModelMixin, ConfigMixin):
    """:class:`meanflow.model.dit.DiT` itself, under diffusers' names for inputs and outputs.

    The parameters are those of :class:`meanflow.config.ModelConfig`, and the state dict is DiT's.

    Raises:
        ValueError: for parameters that ModelConfig refuses.
    """

    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _supports_gradient_checkpointing = True
    # a few small layers whose rounding the whole image shows
    _skip_layerwise_casting_patterns = ["embedder", "final_layer"]

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
    ):
        config = ModelConfig(
            depth, hidden_size, num_heads, patch_size, input_size, in_channels, num_classes, mlp_ratio, time_embedding
        )
        super().__init__(**dit_options(config) | {"time_embedding": tuple(time_embedding.split(","))})
        self.register_state_dict_post_hook(_with_what_is_offloaded)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as diffusers does; the position table, which no file holds, is computed in the weights' dtype.

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
        """Recompute each block in backward, by DiT's own checkpointing, which handles tangents."""
        for block in self.blocks:
            block.checkpointed = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep each block's activations."""
        for block in self.blocks:
            block.checkpointed = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The average velocity from timestep t back to r.

        Args:
            hidden_states: z (B, channels, size, size). timestep, r_timestep: t and r (B,) in [0, 1], r <= t, best in
                fp32 whatever the model's dtype. class_labels: (B,), int64; None is the null class for all.

        Returns:
            An output whose sample is u, shaped like z, in the model's dtype; or a tuple of it.
        """
        if class_labels is None:
            class_labels = torch.full((len(hidden_states),), self.num_classes, device=hidden_states.device)
        u = super().forward(hidden_states, r_timestep, timestep, class_labels)
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)


def _with_what_is_offloaded(model: nn.Module, state: dict[str, Tensor], prefix: str, _) -> None:
    """Add to a state dict the weights that accelerate's hooks hold while their layers are not in use."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            for leaf in module._parameters if getattr(each, "weights_map", None) is not None else ():
                key = f"{prefix}{name}.{leaf}"
                if state[key].is_meta:
                    state[key] = each.weights_map[leaf]
