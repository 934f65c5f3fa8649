"""The autoencoder whose latents are learnt."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError


def load_vae(name: str, device: torch.device, option: str) -> nn.Module:
    """diffusers' AutoencoderKL of a local folder or of the hub, frozen.

    Args:
        option: what the user named it by, for the message.

    Raises:
        UserError: where it cannot be loaded.
    """
    from diffusers import AutoencoderKL  # nine seconds to import

    offline = not Path(name).exists() and not hub_answers()
    try:
        vae, loaded = AutoencoderKL.from_pretrained(
            name, output_loading_info=True, low_cpu_mem_usage=False,
            local_files_only=offline,
        )  # fmt: skip
        reason = f"it lacks the weights {loaded['missing_keys'][:1]}" if loaded["missing_keys"] else None
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0] + "; the hub does not answer" * offline
    if reason is not None:
        raise UserError(
            f"{option}: got {name!r}, which cannot be loaded ({reason}), wanted a diffusers AutoencoderKL; "
            f"name a local folder by --{option} FOLDER"
        )
    return vae.to(device).eval().requires_grad_(False)


def hub_answers() -> bool:
    """Whether the hub can be reached: one question, where its own downloads try again for half a minute."""
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
    """What an autoencoder is, for a manifest: its name, the SHA-256 of its weights, and its configuration."""
    digest = hashlib.sha256()
    for key, x in sorted(vae.state_dict().items()):
        digest.update(f"{key} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {"name": name, "sha256": digest.hexdigest(), "config": config}


def check_vae(name: str, vae: nn.Module, manifest: dict) -> None:
    """Raise UserError unless a cache's latents are this autoencoder's; an imported cache knows its name alone."""
    theirs, ours = manifest["vae"], identity(name, vae)["sha256"]
    if theirs["sha256"] not in (None, ours):
        raise UserError(
            f"data.vae: got {name!r} (weights {ours[:12]}...), wanted the autoencoder of the latents, "
            f"{theirs['name']!r} (weights {theirs['sha256'][:12]}...); name it by --data.vae FOLDER"
        )
