"""Feeds the readers mutated images, tar files, folders, latents and manifests, each a function of its number.

    python tests/fuzz_readers.py FIRST COUNT

Prints a JSON object: how each case ended, and the process's largest memory. A case fails by anything but a result or
one line of refusal, by entries that are not accounted for, or by more than 5 s of work.
"""

import contextlib
import faulthandler
import io
import json
import os
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, features

from meanflow.data.cache import Cache, verify
from meanflow.data.decoding import Unreadable, centre_crop, decode
from meanflow.data.import_latents import LAYOUTS, ImportOptions, import_latents, read_latent
from meanflow.data.sources import open_source
from meanflow.errors import UserError
from meanflow.evaluation.fid_reference import ArrayImages, FolderImages
from meanflow.evaluation.frechet import read_statistics

SECONDS, STUCK = 5, 60  # of work, and by the clock, on machines that others share
Rng = np.random.Generator


def stored(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (37, 45, 3), np.uint8))
    deep = Image.fromarray(rng.integers(0, 2**16, (37, 45)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        stored(rgb, "JPEG", exif=exif), stored(rgb, "JPEG", progressive=True), stored(rgb.convert("CMYK"), "JPEG"),
        stored(rgb, "PNG", exif=exif), stored(rgb.convert("P"), "PNG", transparency=3), stored(deep, "PNG"),
        stored(rgb.convert("RGBA"), "WEBP", exif=exif), stored(rgb, "WEBP", lossless=True), stored(rgb, "BMP"),
        stored(rgb, "TIFF", compression="tiff_lzw"), stored(deep, "TIFF"), stored(rgb, "TIFF", compression="jpeg"),
        stored(rgb, "PPM"), stored(deep, "PPM"), stored(rgb, "GIF"), stored(rgb, "JPEG2000"), stored(rgb, "TGA"),
        stored(rgb, "ICO", sizes=[(16, 16)]), *([stored(rgb, "AVIF")] if features.check("avif") else []),
    ]  # fmt: skip


PICTURES = pictures()
SMALL = stored(Image.new("RGB", (9, 8), (200, 0, 0)), "PNG")


def mutated(data: bytes, rng: Rng) -> bytes:
    """One to three changes: bits, runs of bytes, numbers at the edge, repetitions, seldom a cut."""
    x = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not x:
            break
        # headers are the most interesting
        i = int(rng.integers(0, min(len(x), 600 if rng.random() < 0.6 else len(x))))
        n = int(rng.integers(1, 9))
        match rng.integers(0, 11) // 2:
            case 0:
                x[i] ^= 1 << int(rng.integers(8))
            case 1:
                x[i : i + n] = rng.bytes(n)
            case 2:
                x[i : i + n] = bytes([int(rng.choice([0, 255, 127, 128]))]) * n
            case 3:
                del x[i : i + n]
            case 4:
                x[i:i] = x[i : i + 16 * n]
            case 5:
                del x[int(rng.integers(0, len(x))) :]
    return bytes(x)


def image(rng: Rng, folder: Path) -> str:
    data = mutated(PICTURES[rng.integers(len(PICTURES))], rng)
    rules = {"exif": str(rng.choice(["ignore", "apply"])), "alpha": str(rng.choice(["drop", "white", "black"]))}
    try:
        rgb, mode = decode(data, **rules)
    except Unreadable as error:
        assert str(error).isprintable() and str(folder) not in str(error), error
        return "unreadable"
    assert rgb.mode == "RGB" and mode
    assert np.asarray(centre_crop(rgb, 16)).shape == (16, 16, 3)
    return "decoded"


NAMES = ("a", "b", "a.b", "1.5", "d/a", "./c", "._a", ".x/a", "__MACOSX/a", "A", "train", "d/../e")
ENDINGS = (".jpg", ".cls", ".cls", ".PNG", ".CLS", ".seg.png", ".json", "", ".gif", ".tiff")


def name_of(rng: Rng) -> str:
    return str(rng.choice(NAMES)) + str(rng.choice(ENDINGS))


def tar_file(path: Path, rng: Rng) -> list[str]:
    """The members' names, of pairs for the most part."""
    names = [f"{key}{ending}" for key in rng.choice(NAMES, 3) for ending in (".jpg", ".cls")]
    names += [name_of(rng) for _ in range(rng.integers(0, 2))]
    with tarfile.open(
        path, "w", format=int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ) as tar:
        for name in names:
            info, data = tarfile.TarInfo(name), SMALL
            if name.lower().endswith(".cls"):
                data = str(rng.integers(0, 9)).encode() if rng.random() < 0.95 else rng.bytes(3)
            if rng.random() < 0.1:
                info.type, info.linkname = rng.choice([tarfile.LNKTYPE, tarfile.SYMTYPE]), str(rng.choice(names))
                data = b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return names


def tars(rng: Rng, folder: Path) -> str:
    path = folder / "0.tar"
    names = tar_file(path, rng)
    broken = rng.random() < 0.4
    if broken:
        path.write_bytes(mutated(path.read_bytes(), rng))
    try:
        source = open_source(str(folder))
    except UserError as error:
        assert str(error).isprintable(), error
        return "refused"
    for i in range(len(source.names)):
        with contextlib.suppress(Unreadable):
            decode(source.read(i))
    # a label belongs to its image
    assert broken or source.entries.count + len(source.names) == len(names), (names, source.names)
    return "read"


def folders(rng: Rng, folder: Path) -> str:
    files = set()
    for _ in range(rng.integers(1, 9)):
        parts = [
            str(rng.choice(["n1", "n2", "train", "val", ".git", "__MACOSX", "n1", "n2"]))
            for _ in range(int(rng.choice([0, 1, 1, 1, 2])))
        ]
        path = folder.joinpath(*parts, name_of(rng).replace("/", "_"))
        with contextlib.suppress(OSError):  # a folder where a file is
            path.parent.mkdir(parents=True, exist_ok=True)
            if rng.random() < 0.1:
                path.symlink_to(str(rng.choice(["..", ".", "nowhere", "../n1", "../n2/a.jpg"])))
            else:
                path.write_bytes(SMALL if rng.random() < 0.8 else mutated(SMALL, rng))
            files.add(path)
    ends = []
    for reader in (lambda: open_source(str(folder), str(rng.choice(["train", "val"]))), lambda: FolderImages(folder)):
        try:
            source = reader()
            names = [str(p.relative_to(folder)) for p in files]
            left = [name for those in source.entries.left_out().values() for name in those["names"]]
            for i in range(len(source.names)):
                with contextlib.suppress(Unreadable, OSError, UserError):
                    source.read([i]) if isinstance(source, FolderImages) else decode(source.read(i))
            base = "" if source.path == folder else source.path.name + "/"
            linked = any(p.is_symlink() for p in files)
            for name in names:  # each is used, left out, or below a folder that is
                known = [base + x for x in (*source.names, *left)]
                assert (
                    linked or not name.startswith(base) or any(name == x or name.startswith(x + "/") for x in known)
                ), name
            ends.append("read")
        except UserError as error:
            assert str(error).isprintable(), error
            ends.append("refused")
    return " and ".join(ends)


MOMENTS = np.abs(np.random.default_rng(0).normal(size=(3, 8, 4, 4))).astype(np.float32)
LISTED = {"labels": [["0.npy", 1], ["1.npy", 0], ["2.npy", 2]]}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def latents(rng: Rng, folder: Path) -> str:
    """A layout of which one file is mutated, or its list."""
    layout = str(rng.choice(["official", "repa", "zip", "arrays"]))
    path, files = folder / "old", {}
    if layout == "official":
        import torch

        for i in range(3):
            file = io.BytesIO()
            torch.save({"image": torch.from_numpy(MOMENTS[i]), "label": i}, file)
            files[f"{i}.pt"] = file.getvalue()
    elif layout == "arrays":
        files = {"mean.npy": npy(MOMENTS[:, :4]), "std.npy": npy(MOMENTS[:, 4:]), "labels.npy": npy(np.arange(3))}
    else:
        files = {f"{i}.npy": npy(x) for i, x in enumerate(MOMENTS)} | {"dataset.json": json.dumps(LISTED).encode()}
    broken = str(rng.choice(list(files)))
    files[broken] = mutated(files[broken], rng)
    if layout == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in files.items():
                file.writestr(name, data)
        if rng.random() < 0.7:
            path.write_bytes(mutated(path.read_bytes(), rng))
    else:
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    try:
        source = LAYOUTS["repa" if layout == "zip" else layout](path)
        for i in range(len(source.names)):
            moments, label, _ = read_latent(source, i)
            assert moments.shape[0] == 2 and label >= 0
    except UserError as error:
        assert str(error).isprintable(), error
        return "refused"
    return "read"


def manifest(rng: Rng, folder: Path) -> str:
    """A cache of which one file is mutated: the same command makes it whole again, or refuses in one line."""
    old = folder / "old"
    old.mkdir()
    for name, x in (("mean", MOMENTS[:, :4]), ("std", MOMENTS[:, 4:]), ("labels", np.arange(3))):
        np.save(old / f"{name}.npy", x)
    options = ImportOptions(layout="arrays", workers=1, shard_rows=2, repair=True)
    import_latents(old, folder / "new", options)
    whole = {path.name: path.read_bytes() for path in (folder / "new").iterdir()}
    broken = str(rng.choice(sorted(whole)))
    (folder / "new" / broken).write_bytes(mutated(whole[broken], rng))
    for reader in (Cache, verify):
        try:
            reader(folder / "new")
        except UserError as error:
            assert str(error).isprintable(), error
    try:
        import_latents(old, folder / "new", options)
    except UserError as error:
        assert str(error).isprintable() and broken == "job.json", (broken, error)
        return "refused"
    found = {path.name: path.read_bytes() for path in (folder / "new").iterdir()}
    for name, data in whole.items():
        # a blank more in a shard's entry says the same
        read = json.loads if name.startswith("shard") and name.endswith(".json") else bytes
        # of another place of the same source the job, and with it the manifest, may tell
        assert broken == "job.json" or read(found[name]) == read(data), (broken, name)
    return "made whole"


def statistics(rng: Rng, folder: Path) -> str:
    """A reference's .npz, mutated."""
    file = io.BytesIO()
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, arr_0=pixels, mu=np.zeros(6), sigma=np.eye(6))
    (folder / "a.npz").write_bytes(mutated(file.getvalue(), rng))
    ends = []
    for reader in (read_statistics, ArrayImages):
        try:
            reader(folder / "a.npz")
            ends.append("read")
        except UserError as error:
            assert str(error).isprintable(), error
            ends.append("refused")
    return " and ".join(ends)


KINDS: tuple[Callable[[Rng, Path], str], ...] = (
    image, tars, statistics, folders, image, latents, image, tars, image, manifest,
)  # fmt: skip


def peak_memory() -> int:
    """Bytes that this program held at most; getrusage's count begins with those of what started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main(first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter()
    slowest = 0.0
    for number in range(first, first + count):
        kind, start = KINDS[number % len(KINDS)], time.process_time()
        faulthandler.dump_traceback_later(STUCK, exit=True)
        # the bars and lines of a preparation are not what is asked for
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                try:
                    end = kind(np.random.default_rng(number), Path(folder))
                except BaseException as error:
                    raise SystemExit(f"case {number}, {kind.__name__}: {type(error).__name__}: {error}") from error
        faulthandler.cancel_dump_traceback_later()
        seconds = time.process_time() - start
        assert seconds < SECONDS, f"case {number}, {kind.__name__}: {seconds:.1f} s"
        slowest = max(slowest, seconds)
        ends[f"{kind.__name__} {end}"] += 1
    memory = peak_memory()
    print(json.dumps({"ends": dict(sorted(ends.items())), "memory": memory, "slowest": slowest}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
