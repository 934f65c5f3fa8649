"""Decode image files to RGB, as they are stored or not at all, in bounded memory.

deep grey   of 9 to 16 bits is scaled so that white is 255; pixels of 32 bits or floats do not say what white is, and
            are refused
alpha       is dropped, or laid over white or black
EXIF        orientation is ignored, or applied (TIFF's own tag always is, by Pillow)
size        up to LARGE pixels come out as they are. Of more, the centre square is taken, which a centre crop looks at
            anyway, and reduced by a whole factor to LARGE pixels; one such image is decoded at a time. More than
            2 LARGE are refused where the format is not decoded row by row, more than Pillow's limit always
"""

import io
import math
import threading
from typing import Literal

import numpy as np
from PIL import Image

from .entries import check_size, reason

LARGE = 2**25
ROW_BY_ROW = {"JPEG", "MPO", "PNG", "BMP", "DIB", "PPM"}
STRIP = 2**22  # pixels that are converted at a time
Exif, Alpha = Literal["ignore", "apply"], Literal["drop", "white", "black"]

_ORIENTATION = 0x0112  # EXIF's and TIFF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_at_a_time = threading.Lock()


class Unreadable(ValueError):
    """An image file that cannot be decoded; the message is one line, the same on every machine."""


def decode(file: bytes, exif: Exif = "ignore", alpha: Alpha = "drop") -> tuple[Image.Image, str]:
    """Decode an image file to RGB; returns the image and its stored mode.

    Raises:
        Unreadable: for whatever reason.
    """
    try:
        check_size(len(file))
        image = Image.open(io.BytesIO(file), formats=_formats())
        if not image.width * image.height:
            raise ValueError("no pixels")
        if image.width * image.height <= LARGE:
            rgb = _rgb(image, _white(image), alpha)
        else:
            with _one_at_a_time:
                rgb = _shrunk(image, alpha)
        # after decoding, when Pillow has taken away the tags that it has heeded
        if exif == "apply" and (turn := _TURNS.get(image.getexif().get(_ORIENTATION))) is not None:
            rgb = rgb.transpose(turn)
        return rgb, image.mode
    except Exception as error:  # half of Python's exceptions, by the format and the damage
        raise Unreadable(reason(error)) from None


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name != "EPS"]  # which would start another program


def _white(image: Image.Image) -> int:
    """The value of white; negative if white is 0."""
    bits, inverted = 8, False
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        bits = 16
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits or floats (mode {image.mode}), which do not say what white is")
    return (1 - 2**bits) if inverted else 2**bits - 1


def _rgb(image: Image.Image, white: int, alpha: Alpha) -> Image.Image:
    if image.mode.startswith("I"):
        grey, top = np.asarray(image).astype(np.int64), abs(white)
        scaled = ((grey * 255 + top // 2) // top).clip(0, 255).astype(np.uint8)
        return Image.fromarray(scaled if white > 0 else 255 - scaled).convert("RGB")
    if alpha != "drop" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)
    return image.convert("RGB")


def _shrunk(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Reduce the centre square of a large image by a whole factor, in RGB."""
    pixels = image.width * image.height
    if pixels > 2 * LARGE and image.format not in ROW_BY_ROW:
        raise ValueError(f"{pixels:,} pixels, more than {2 * LARGE:,} of {image.format}; store it smaller")
    white, side = _white(image), min(image.size)
    factor = math.ceil(side / math.sqrt(LARGE))
    image.draft(image.mode, (side // factor, side // factor))  # JPEG is decoded at half the size or less
    side = min(image.size)
    factor = math.ceil(side / math.sqrt(LARGE))
    left, top, small = (image.width - side) // 2, (image.height - side) // 2, side // factor
    result, rows = Image.new("RGB", (small, small)), max(1, STRIP // (side * factor))
    for row in range(0, small, rows):
        last = min(row + rows, small)
        strip = image.crop((left, top + row * factor, left + small * factor, top + last * factor))
        result.paste(_rgb(strip, white, alpha).reduce(factor), (0, row))
    return result


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol, arXiv 2105.05233, appendix; guided-diffusion's image_datasets.py).

    Halved by box filters while the shorter side is at least twice the size, then resized by a bicubic filter until it
    is the size, then cut out of the middle. Where the resized image would have more than LARGE pixels, its middle
    alone is computed.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    side = min(image.size)
    scale = size / side
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max(LARGE, size * size):
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
