"""Small image folders, autoencoders and latent caches for the tests."""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meanflow.data.import_latents import ImportOptions, import_latents

SIZE = 16  # of the cropped images
SHAPE = (4, SIZE // 2, SIZE // 2)


@functools.cache
def pictures() -> list[tuple[str, Image.Image]]:
    """Class and picture: scikit-learn's digits in grey, windows of its two photographs in RGB, CMYK and RGBA."""
    from sklearn.datasets import load_digits, load_sample_images

    found = []
    for i, digit in enumerate(load_digits().images[:8]):
        grey = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20 + i, 24))
        found.append(("b_digit", grey))
    for name, photo in zip(("c_china", "a_flower"), load_sample_images().images, strict=True):
        for i in range(6):
            window = Image.fromarray(photo[30 * i : 30 * i + 40 + 9 * i, 50 * i : 50 * i + 75 - 8 * i])
            found.append((name, window.convert(("RGB", "RGB", "RGB", "RGB", "CMYK", "RGBA")[i])))
    return found


def image_folder(path: Path) -> Path:
    """The pictures as class folders, of JPEG and PNG files."""
    for i, (name, image) in enumerate(pictures()):
        (path / name).mkdir(parents=True, exist_ok=True)
        ending = "png" if image.mode == "RGBA" else "JPEG"
        image.save(path / name / f"{i:03d}.{ending}", quality=90)
    return path


def tiny_vae(path: Path, seed: int = 0, **options) -> Path:
    """A randomly initialised AutoencoderKL that halves the sides, saved as diffusers does."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
    }
    AutoencoderKL(**settings | options).save_pretrained(path)
    return path


def cache_of(folder: Path, mean: np.ndarray, std: np.ndarray, labels: np.ndarray, **options) -> Path:
    """A cache of these arrays (N, C, S, S) and (N,), in folder/cache."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("mean", mean), ("std", std), ("labels", labels)):
        np.save(folder / f"{name}.npy", array)
    import_latents(folder, folder / "cache", ImportOptions(layout="arrays", **options))
    return folder / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def jpeg(image: Image.Image) -> bytes:
    """As a JPEG file."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG")
    return file.getvalue()
