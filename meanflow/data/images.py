"""Images as bytes and as pictures: idx files, grids with captions, PNG files."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, require

CAPTION = 16
"""Height of a caption above an image, in pixels."""


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an idx file of bytes, the format of MNIST, packed by gzip if its name ends in .gz.

    Returns:
        uint8, of the sizes that the file states.

    Raises:
        UserError: for a file that cannot be read or unpacked, is no idx file of so many dimensions, or has another
            length than it states.
    """
    hint = "get the file anew"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: got a file that cannot be read ({error}), wanted an idx file; {hint}") from None
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    got, wanted = data[:4].hex(), f"{magic.hex()}, an idx file's of bytes in {dimensions} dimension(s)"
    require(data[:4] == magic, f"{path}: first bytes", got, wanted, hint)
    require(len(data) >= start, f"{path}: bytes", len(data), f"a header of {start}", hint)
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    length = start + math.prod(shape)
    require(len(data) == length, f"{path}: bytes", len(data), f"{length} for its sizes {shape}", hint)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def to_uint8(images: Tensor) -> Tensor:
    """Convert [-1, 1] to uint8 as the official evaluation does: 127.5 x + 128, clipped and truncated."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, columns: int) -> Tensor:
    """Arrange uint8 images (N, channels, height, width) as a picture (height, width, channels), one pixel apart."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    picture = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 255, dtype=torch.uint8)
    for i, image in enumerate(images.cpu().permute(0, 2, 3, 1)):
        top, left = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        picture[top : top + height, left : left + width] = image
    return picture


def captioned(images: Tensor, captions: Sequence[str], columns: int, zoom: int = 1) -> Tensor:
    """:func:`grid` with each pixel repeated zoom times and a caption above each image, cut to its width."""
    from PIL import Image, ImageDraw, ImageFont

    n, channels, height, width = images.shape
    high, wide = zoom * (height + 1), zoom * (width + 1)
    rows = -(-n // columns)
    size = columns * wide + zoom, rows * (high + CAPTION) + zoom
    canvas = Image.new("L" if channels == 1 else "RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(CAPTION - 4)
    for i, (image, caption) in enumerate(zip(images.cpu().permute(0, 2, 3, 1), captions, strict=True)):
        left, top = i % columns * wide + zoom, i // columns * (high + CAPTION)
        while draw.textlength(caption, font) > wide - zoom:
            caption = caption[:-1]
        draw.text((left, top), caption, "black", font)
        pixels = image.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
        canvas.paste(Image.fromarray(pixels.squeeze(-1).numpy()), (left, top + CAPTION))
    return torch.from_numpy(np.array(canvas)).reshape(canvas.height, canvas.width, channels)


def save_png(path: Path | BinaryIO, picture: Tensor, zoom: int = 1) -> None:
    """Save a uint8 picture (height, width, 1 or 3) as a PNG file, each pixel repeated zoom times."""
    from PIL import Image

    picture = picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    Image.fromarray(picture.squeeze(-1).numpy()).save(path, format="PNG")
