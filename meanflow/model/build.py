"""Build the network of a configuration, and fill it with weights."""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import UserError, nearest
from .dit import DiT
from .imf import ImfDiT

Network = DiT | ImfDiT


def build_net(
    config: ModelConfig, compute_dtype: torch.dtype | None = None, *, checkpoint_blocks: bool = False
) -> Network:
    """Build the network of a configuration."""
    kind = {"dit": DiT, "imf": ImfDiT}[config.network]
    return kind(**config.options, compute_dtype=compute_dtype, checkpoint_blocks=checkpoint_blocks)


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


def check_whole(tensors: dict[str, Tensor], model: ModelConfig) -> None:
    """Check that the tensors are those of the network.

    Raises:
        UserError: for a missing or unknown one, or one of another shape; with the names nearest to an unknown one.
    """
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in build_net(model).state_dict().items()}
    found = {name: x.shape for name, x in tensors.items()}
    strange = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if not strange:
        return
    name = min(strange, key=lambda name: (name in wanted, name))  # an unknown name tells more than a missing one
    near = "" if name in wanted else f", nearest to it {nearest(name, wanted)}"
    raise UserError(
        f"checkpoint: got {len(strange)} tensors missing, too many or of another shape, such as {[name]}{near}, "
        f"wanted the network {model.name}; is it whole, and of this format?"
    )
