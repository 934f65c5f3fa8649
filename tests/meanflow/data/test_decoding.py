"""Decoding: deep grey keeps its ramp, whatever is broken says so in one line, large images take bounded memory."""

import io
import struct
import subprocess
import sys
import zlib

import caches
import numpy as np
import pytest
from fresh import environment
from PIL import Image, features

from meanflow.data import decoding
from meanflow.data.cache import Cache
from meanflow.data.decoding import Unreadable, centre_crop, decode
from meanflow.data.preparation import Options, prepare
from meanflow.errors import UserError
from meanflow.evaluation.fid_reference import FolderImages

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


def file_of(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(pixels, bits, white_is_zero=False, order="<"):
    """An uncompressed grey TIFF of one strip."""
    data, (height, width) = pixels.tobytes(), pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 0, 277: 1, 278: height,
            279: len(data)}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8) + struct.pack(order + "H", len(tags))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + entries + bytes(4) + data


def twelve_bits():
    """Pairs of 12-bit numbers in three bytes each."""
    a, b = (RAMP >> 4).reshape(-1, 2).astype(np.uint32).T
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)
    return tiff(packed.reshape(64, 96), 12).replace(
        struct.pack("<HHII", 256, 4, 1, 96), struct.pack("<HHII", 256, 4, 1, 64)
    )


def png_of(depth, colour, rows):
    """A PNG of rows of bytes."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 64, 64, depth, colour, 0, 0, 0),
              b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)), b"IEND": b""}  # fmt: skip
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks.items():
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


BIG = RAMP.astype(">u2")
DEEP = {
    "PNG": file_of(Image.fromarray(RAMP), "PNG"),
    "PNG in colours": png_of(16, 2, [row.tobytes() for row in BIG.repeat(3, 1)]),
    "PNG with alpha": png_of(16, 4, [np.stack([row, 0 * row + 65535], 1).astype(">u2").tobytes() for row in RAMP]),
    "TIFF": file_of(Image.fromarray(RAMP), "TIFF"),
    "TIFF, compressed": file_of(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "TIFF, big-endian": tiff(BIG, 16, order=">"),
    "TIFF, 12 bits": twelve_bits(),
    "PGM": file_of(Image.fromarray(RAMP), "PPM"),
    "PGM, 12 bits": b"P5 64 64 4095 " + (RAMP >> 4).astype(">u2").tobytes(),
    "JPEG 2000": file_of(Image.fromarray(RAMP), "JPEG2000"),
}


@pytest.mark.parametrize("file", DEEP.values(), ids=DEEP)
def test_a_deep_ramp_stays_one(tmp_path, file):
    rgb, _ = decode(file)
    pixels = np.asarray(rgb)
    wanted = (RAMP / 257)[..., None]
    assert np.abs(pixels - wanted).max() <= 1  # of 16-bit colours Pillow keeps the upper byte
    (tmp_path / "1.png").write_bytes(file)
    assert (FolderImages(tmp_path).read([0])[0].permute(1, 2, 0).numpy() == pixels).all()


def test_deep_grey_is_rounded():
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    wanted = np.floor(values / 257 + 0.5)
    assert (np.asarray(decode(file_of(Image.fromarray(values), "PNG"))[0])[..., 0] == wanted).all()


def test_where_white_is_zero():
    assert (np.asarray(decode(tiff(65535 - RAMP, 16, white_is_zero=True))[0])[..., 0] == np.round(RAMP / 257)).all()


NO_WHITE = {
    "floats": Image.fromarray(RAMP.astype(np.float32)),
    "floats to 1": Image.fromarray((RAMP / 65535).astype(np.float32)),
    "32 bits": Image.fromarray(RAMP.astype(np.int32)),
}


@pytest.mark.parametrize("image", NO_WHITE.values(), ids=NO_WHITE)
def test_pixels_without_a_white_are_refused(image):
    with pytest.raises(Unreadable, match="which do not say what white is"):
        decode(file_of(image, "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_come_out_as_pillow_converts_them(mode):
    image = caches.pictures()[9][1].convert(mode)
    file = file_of(image, "TIFF")
    rgb, found = decode(file)
    assert found == mode and rgb.tobytes() == Image.open(io.BytesIO(file)).convert("RGB").tobytes()


# --- what cannot be read ---

PHOTO = caches.pictures()[9][1]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
JPEG = file_of(PHOTO, "JPEG")
BROKEN = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "JPEG cut": JPEG[: len(JPEG) // 2],
    "PNG cut": file_of(NOISE, "PNG")[:2000],
    "PNG damaged": file_of(PHOTO, "PNG").replace(b"IDAT", b"IDAX", 1),
    "WebP cut": file_of(NOISE, "WEBP")[:300],
    "TIFF cut": file_of(PHOTO, "TIFF", compression="tiff_lzw")[:-400],
    "GIF cut": file_of(NOISE, "GIF")[:900],
    "no pixels": file_of(PHOTO, "BMP")[:18] + bytes(8) + file_of(PHOTO, "BMP")[26:],
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n",
    "a bomb": file_of(Image.new("1", (20000, 20000)), "PNG"),
}
if features.check("avif"):
    BROKEN["AVIF cut"] = file_of(NOISE, "AVIF")[:600]


@pytest.mark.parametrize("file", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_says_so(tmp_path, file):
    reasons = set()
    for _ in range(2):
        with pytest.raises(Unreadable) as error:
            decode(bytes(bytearray(file)))  # at another address
        reasons.add(str(error.value))
    assert len(reasons) == 1
    text = reasons.pop()
    assert text.isprintable() and "0x" not in text and "/" not in text
    (tmp_path / "1.png").write_bytes(file)
    with pytest.raises(UserError, match="1.png, which cannot be read") as error:
        FolderImages(tmp_path).read([0])
    assert str(error.value).isprintable()


def test_no_other_program_is_started():
    with pytest.raises(Unreadable, match="cannot identify image file"):  # and not that Ghostscript is missing
        decode(BROKEN["PostScript"])


@pytest.mark.parametrize(
    "raised", [RuntimeError, KeyError, MemoryError, ZeroDivisionError, struct.error, AssertionError]
)
def test_whatever_is_raised_is_unreadable(monkeypatch, raised):
    def load(self):
        raise raised("broken")

    file = file_of(PHOTO, "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(Unreadable, match="broken"):
        decode(file)


def test_damaged_images_are_left_out_the_same_in_every_run(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for i, file in enumerate((JPEG, *BROKEN.values(), file_of(Image.fromarray(RAMP), "PNG"))):
        (folder / f"{i:02d}.jpg").write_bytes(file)
    vae = str(caches.tiny_vae(tmp_path / "vae"))
    options = {"image_size": 16, "vae": vae, "device": "cpu", "shard_rows": 4}
    with pytest.raises(UserError, match="a/01.jpg, which cannot be read .* --bad-images skip"):
        prepare(str(folder.parent), tmp_path / "fatal", Options(**options))
    skip = Options(**options, bad_images="skip")
    manifest = prepare(str(folder.parent), tmp_path / "one", skip)
    prepare(str(folder.parent), tmp_path / "two", skip)
    assert caches.contents(tmp_path / "one") == caches.contents(tmp_path / "two")
    account = manifest["entries"]
    assert (account["count"], account["used"], account["left_out"]) == (2 + len(BROKEN), 2, len(BROKEN))
    assert [name for name, _ in manifest["skipped"]] == [f"a/{i:02d}.jpg" for i in range(1, 1 + len(BROKEN))]
    assert manifest["converted"] == {"I;16": 1}


# --- size ---


def test_images_below_the_limit_come_out_to_the_bit():
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    rgb, _ = decode(file_of(Image.fromarray(noise), "PNG"))
    assert (np.asarray(rgb) == noise).all()


@pytest.mark.parametrize("shape", [(600, 600), (601, 603), (300, 1400), (1300, 310)], ids=str)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_large_images_are_reduced_by_a_whole_factor(monkeypatch, format, shape):
    """As the crop of the whole image looks, but for the reduction's rounding and the crop's phase."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    smooth = np.stack([127 + 120 * np.sin(x / 90), 127 + 120 * np.cos(y / 80), 60 + (x + y) * 0.1], 2)
    file = file_of(Image.fromarray(smooth.astype(np.uint8)), format)
    whole = np.asarray(centre_crop(decode(file)[0], 32)).astype(int)
    monkeypatch.setattr(decoding, "LARGE", 2**16)
    monkeypatch.setattr(decoding, "STRIP", 2**14)
    rgb, mode = decode(file)
    assert mode == "RGB" and rgb.width * rgb.height <= 2**16 and rgb.width == rgb.height
    # a phase of half a pixel of the crop is 1.5 grey values on the slopes of 3 a pixel
    assert np.abs(np.asarray(centre_crop(rgb, 32)).astype(int) - whole).mean() < 2.5


def test_large_deep_images_are_scaled_too(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 2**10)
    pixels = np.asarray(decode(file_of(Image.fromarray(RAMP), "PNG"))[0])
    assert pixels.shape == (32, 32, 3) and 126 < pixels.mean() < 129


def test_large_images_of_other_formats_are_refused(monkeypatch):
    monkeypatch.setattr(decoding, "LARGE", 1000)
    with pytest.raises(Unreadable, match="3,000 pixels, more than 2,000 of WEBP"):
        decode(file_of(PHOTO.resize((60, 50)), "WEBP"))


THIN = {"wide": (2**20, 1), "high": (1, 2**20), "wide by 3": (2**18, 3), "odd": (99_999, 7)}


@pytest.mark.parametrize("size", THIN.values(), ids=THIN)
def test_thin_images_give_their_middle(size):
    """Resized whole they would have up to 2^36 pixels."""
    image = Image.new("RGB", size, (10, 20, 30))
    middle = (size[0] // 2, size[1] // 2)
    image.paste((200, 100, 50), (middle[0] - 20, middle[1] - 20, middle[0] + 20, middle[1] + 20))
    crop = np.asarray(centre_crop(image, 256))
    assert crop.shape == (256, 256, 3) and (crop == [200, 100, 50]).all()


def test_the_middle_is_that_of_the_whole(monkeypatch):
    image = PHOTO.resize((900, 31))
    whole = np.asarray(centre_crop(image, 64)).astype(int)
    monkeypatch.setattr(decoding, "LARGE", 2**10)
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a))
    middle = np.asarray(centre_crop(image, 64)).astype(int)
    assert sizes == [(64, 64)]
    assert np.abs(middle - whole).mean() < 3  # half a pixel of phase, and the filter's edge


HUGE = {
    "PNG": lambda: file_of(Image.new("RGBA", (13_000, 13_000), (200, 0, 0, 255)), "PNG", compress_level=1),
    "one bit": lambda: file_of(Image.new("1", (13_000, 13_000)), "PNG"),
    "progressive": lambda: file_of(Image.new("RGB", (13_000, 13_000)), "JPEG", progressive=True, subsampling=0),
    "a scroll": lambda: file_of(Image.new("RGB", (65_000, 2000)), "JPEG"),
    "WebP": lambda: file_of(Image.new("RGB", (8000, 8000)), "WEBP", method=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", HUGE.values(), ids=HUGE)
def test_huge_images_take_bounded_memory(tmp_path, make):
    (tmp_path / "file").write_bytes(make())
    program = f"""
import pathlib
from meanflow.data.decoding import centre_crop, decode
image, _ = decode(pathlib.Path({str(tmp_path / "file")!r}).read_bytes())
assert centre_crop(image, 256).size == (256, 256)
# of this program alone: getrusage's count begins with what started it
print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**21  # KiB


def test_fid_images_are_not_reduced(tmp_path):
    Image.new("RGB", (3000, 3000)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match="got '9000000 pixels', wanted at most 8388608; crop the images"):
        FolderImages(tmp_path).read([0])


def test_files_of_any_size_are_not_read(tmp_path):
    (tmp_path / "1.png").touch()
    with (tmp_path / "1.png").open("r+b") as file:
        file.truncate(2**40)  # takes no room
    with pytest.raises(UserError, match="a file of 1,099,511,627,776 bytes, more than 268,435,456"):
        FolderImages(tmp_path).read([0])


# --- EXIF and alpha ---


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_ignored_or_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.arange(24 * 40 * 3, dtype=np.uint8).reshape(24, 40, 3))
    file = file_of(stored, "PNG", exif=exif)
    assert decode(file)[0].tobytes() == stored.tobytes()
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    applied = decode(file, exif="apply")[0]
    assert applied.size == wanted.size and applied.tobytes() == wanted.tobytes()
    flipped = decode(file_of(stored, "JPEG", exif=exif), exif="apply")[0]
    assert flipped.size == wanted.size


def alpha_pictures():
    """Red, whose left half is transparent, as files."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[:, 8:, 3] = 200, 255
    rgba = Image.fromarray(pixels)
    palette = Image.fromarray((pixels[..., 3] // 255).astype(np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 200, 0, 0])
    return {
        "RGBA": file_of(rgba, "PNG"),
        "WebP": file_of(rgba, "WEBP", lossless=True, exact=True),
        "palette": file_of(palette, "PNG", transparency=0),
        "TIFF": file_of(rgba, "TIFF"),
    }


@pytest.mark.parametrize("file", alpha_pictures().values(), ids=alpha_pictures())
def test_alpha_is_dropped_or_laid_over_a_colour(file):
    left, right = (5, 5), (12, 5)
    for alpha, colour in (("drop", (200, 0, 0)), ("white", (255, 255, 255)), ("black", (0, 0, 0))):
        rgb, _ = decode(file, alpha=alpha)
        assert rgb.getpixel(left) == colour and rgb.getpixel(right) == (200, 0, 0)
    grey = file_of(PHOTO.convert("L"), "PNG")
    assert decode(grey, alpha="white")[0].tobytes() == decode(grey)[0].tobytes()


def test_the_manifest_says_the_rules(tmp_path):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(alpha_pictures()["RGBA"])
    vae = str(caches.tiny_vae(tmp_path / "vae"))
    options = {"image_size": 16, "vae": vae, "device": "cpu", "dtype": "fp32"}
    means = []
    for i, rules in enumerate(({}, {"alpha": "white"}, {"exif": "apply"})):
        manifest = prepare(str(folder.parent), tmp_path / str(i), Options(**options, **rules))
        assert (manifest["exif"], manifest["alpha"]) == (rules.get("exif", "ignore"), rules.get("alpha", "drop"))
        means.append(Cache(tmp_path / str(i)).posterior(np.arange(1))[0])
    assert (means[0] != means[1]).any() and (means[0] == means[2]).all()
    with pytest.raises(UserError, match="alpha: got 'black', wanted 'drop' as .* was begun with"):
        prepare(str(folder.parent), tmp_path / "0", Options(**options, alpha="black"))


def test_crop_of_the_right_size_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 16)) == pixels).all()


def test_crop_takes_the_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 21, 3), np.uint8)
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 16)) == pixels[:, 2:18]).all()


def test_crop_halves_by_boxes():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    wanted = pixels
    for _ in range(2):  # Pillow rounds after the rows and after the columns
        n = len(wanted) // 2
        wanted = np.floor(wanted.reshape(2 * n, n, 2, 3).mean(2) + 0.5)
        wanted = np.floor(wanted.reshape(n, 2, n, 3).mean(1) + 0.5)
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 16)) == wanted).all()
