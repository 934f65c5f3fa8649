"""Build the network of a configuration, and fill it with weights."""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import UserError
from .dit import DiT


def build_net(config: ModelConfig, compute_dtype: torch.dtype | None = None, *, checkpoint_blocks: bool = False) -> DiT:
    """Build the network of a configuration."""
    return DiT(
        input_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        time_embedding=tuple(config.time_embedding.split(",")),
        compute_dtype=compute_dtype,
        checkpoint_blocks=checkpoint_blocks,
    )


def fill(net: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    """Load weights into a network; source: where they came from, for the message.

    Raises:
        UserError: if they do not fit the network.
    """
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:24])
        raise UserError(
            f"checkpoint: got {source}, which does not fit the model ({reason} ...), wanted one of this project and "
            "model; name another"
        ) from None
