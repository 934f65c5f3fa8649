"""Features of images, and their statistics as images stream by."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError, require
from ..world import World
from .frechet import Moments, merge, write_statistics
from .inception import STANDARD_DIGEST, load_inception
from .protocols import clean_resize, inception_input

DINOV2_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digest(module: nn.Module) -> str:
    """Compute the SHA-256 of a module's weights, names included."""
    total = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def load_dinov2(path: Path, device: torch.device | str) -> nn.Module:
    """Load DINOv2 from a local folder of the Hugging Face layout (config.json, model.safetensors); downloads nothing.

    Raises:
        UserError: where the folder or the package that reads it is missing, or the weights cannot be read.
    """
    hint = "download facebook/dinov2-large from huggingface.co and pass its folder by --dinov2 FOLDER"
    require(path.is_dir(), "dinov2", str(path), "a folder with config.json and model.safetensors", hint)
    try:
        from transformers import AutoModel
    except ImportError:
        raise UserError(
            f"dinov2: got {path}, but the package transformers is not installed, wanted it to read the network; "
            "pip install transformers, or leave --dinov2 out"
        ) from None
    try:
        # reads no pickles, no code beside the weights, nothing remote
        net, about = AutoModel.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"dinov2: got {path}, which cannot be loaded ({reason}), wanted safetensors; {hint}") from None
    whole = net.config.model_type == "dinov2" and not about["missing_keys"]
    got = f"{path}, {net.config.model_type} without {sorted(about['missing_keys'])[:3]}"
    require(whole, "dinov2", got, "all weights of a dinov2", hint)
    return net.to(device).eval().requires_grad_(False)


class Extractor:
    """The feature networks of an evaluation, in fp32 without TF32 whatever else is set.

    Args:
        inception: weight file, see :func:`load_inception`.
        dinov2: folder, see :func:`load_dinov2`; None leaves its features out.

    Raises:
        UserError: for weights that are missing or refused.
    """

    def __init__(self, inception: Path | None, device: torch.device | str, dinov2: Path | None = None):
        self.device = torch.device(device)
        self.inception, self.inception_digest = load_inception(inception, device)
        self.dinov2 = None if dinov2 is None else load_dinov2(dinov2, device)

    def identity(self) -> dict[str, str | bool | None]:
        """Identity of the weights."""
        return {
            "inception_sha256": self.inception_digest,
            "inception_is_standard": self.inception_digest.startswith(STANDARD_DIGEST),
            "dinov2_sha256": None if self.dinov2 is None else digest(self.dinov2),
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, resize: str) -> dict[str, Tensor]:
        """Compute fp32 features of uint8 (B, 1 or 3, H, W): pool3 (B, 2048), spatial (B, 2023), dinov2 (B, width)."""
        images = images.to(self.device)
        with exact():
            pool3, spatial = self.inception(inception_input(images, resize))
            features = {"pool3": pool3, "spatial": spatial}
            if self.dinov2 is not None:
                # as Stein et al., arXiv 2306.04675, whatever resize the protocol uses for the Inception
                x = clean_resize(images.float().expand(-1, 3, -1, -1), DINOV2_SIZE) / 255
                mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
                features["dinov2"] = self.dinov2(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
        return features

    def probabilities(self, pool3: Tensor) -> Tensor:
        """The Inception's class probabilities (B, 1008)."""
        with exact():
            return torch.cat([self.inception.probabilities(x.to(self.device)) for x in pool3.split(512)])


@contextmanager
def exact() -> Iterator[None]:
    """Make networks compute in full fp32, without TF32, and the same bits each time, within a with block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class ImageStatistics:
    """Statistics of images that stream by, for a reference of one's own.

        statistics = ImageStatistics(Extractor(inception_file, device))
        for images in batches:  # uint8 (B, 3, H, W), cropped as the samples will be
            statistics.add(images)
        statistics.save(path, world)  # all processes together, where there are several

    Args:
        extractor: the feature networks.
        resize: the axis of the protocols; official numbers use "tensorflow".
    """

    def __init__(self, extractor: Extractor, resize: str = "tensorflow"):
        self.extractor, self.resize = extractor, resize
        self.moments: dict[str, Moments] = {}

    def add(self, images: Tensor) -> dict[str, Tensor]:
        """Add images uint8 (B, 1 or 3, H, W); returns their features."""
        features = self.extractor(images, self.resize)
        for name, x in features.items():
            part = Moments.of(x)
            self.moments[name] = self.moments[name].merged(part) if name in self.moments else part
        return features

    def gathered(self, world: World) -> dict[str, Moments]:
        """Merge the statistics of all processes by rank; the same in each. A collective call.

        Raises:
            UserError: if no process saw an image.
        """
        parts = [part for part in world.gather({n: m.to("cpu") for n, m in self.moments.items()}) if part]
        require(bool(parts), "images", 0, "at least two images", "name another folder")
        return {name: merge([part[name] for part in parts]) for name in parts[0]}

    def save(self, path: Path, world: World) -> None:
        """Write mu and sigma of all processes' images as an .npz, see :func:`write_statistics`. A collective call."""
        moments = self.gathered(world)
        if world.is_main:
            digest = self.extractor.identity()["inception_sha256"]
            facts = {"count": moments["pool3"].count, "resize": self.resize, "inception_sha256": digest}
            write_statistics(path, {name: m.gaussian() for name, m in moments.items()}, **facts)
