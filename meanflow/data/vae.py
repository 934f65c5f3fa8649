"""The autoencoder of the latents."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError


def load_vae(name: str, device: torch.device, option: str) -> nn.Module:
    """Load diffusers' AutoencoderKL from a local folder or the hub, frozen.

    Args:
        option: the option that named it, for the message.

    Raises:
        UserError: where it cannot be loaded.
    """
    from diffusers import AutoencoderKL  # nine seconds to import

    def refusal(reason: str) -> UserError:
        return UserError(
            f"{option}: got {name!r}, which cannot be loaded ({reason}), wanted a diffusers AutoencoderKL; "
            f"name a local folder by --{option} FOLDER"
        )

    offline = not Path(name).exists() and not hub_answers()
    try:
        options = dict(output_loading_info=True, low_cpu_mem_usage=False, local_files_only=offline)
        vae, loaded = AutoencoderKL.from_pretrained(name, **options)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise refusal(f"{reason}; the hub does not answer" if offline else reason) from None
    if loaded["missing_keys"]:
        raise refusal(f"it lacks the weights {loaded['missing_keys'][:1]}")
    return vae.to(device).eval().requires_grad_(False)


def hub_answers() -> bool:
    """Whether the hub can be reached, by one request; its own downloads retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library it is
        return False
    return True


def identity(name: str, vae: nn.Module) -> dict:
    """Identity of an autoencoder for a manifest: name, SHA-256 of its weights, configuration."""
    digest = hashlib.sha256()
    for key, x in sorted(vae.state_dict().items()):
        digest.update(f"{key} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {"name": name, "sha256": digest.hexdigest(), "config": config}


def check_vae(name: str, vae: nn.Module, manifest: dict) -> None:
    """Raise UserError unless this autoencoder made a cache's latents; an imported cache knows only its name."""
    theirs, ours = manifest["vae"], identity(name, vae)["sha256"]
    if theirs["sha256"] not in (None, ours):
        raise UserError(
            f"data.vae: got {name!r} (weights {ours[:12]}...), wanted the autoencoder of the latents, "
            f"{theirs['name']!r} (weights {theirs['sha256'][:12]}...); name it by --data.vae FOLDER"
        )
