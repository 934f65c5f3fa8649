"""Reference data for scores: a file of statistics, or images, whose features are then computed and kept."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..data.decoding import decode
from ..data.entries import IMAGE_ENDINGS, Entries, account, describe, read_file, reason, shown, walk
from ..errors import UserError, require
from ..world import World
from .features import Extractor, ImageStatistics
from .frechet import Gaussian, read_statistics

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
ADM_FILE = "VIRTUAL_imagenet256_labeled.npz"
IMF = "https://huggingface.co/Lyy0725/iMF/resolve/main/"
IMF_FILE = "imagenet_256_fid_stats.npz"
JIT = "https://raw.githubusercontent.com/LTH14/JiT/refs/heads/main/fid_stats/"
JIT_FILE = "jit_in256_stats.npz"
FILES = {"adm": ADM_FILE, "data": "data of your own", "imf": IMF_FILE, "jit": JIT_FILE}
HINTS = {
    "adm": f"fetch {ADM}{ADM_FILE} and pass it by --reference FILE",
    "data": "pass a statistics file, an .npz of images or a folder of images by --data-reference PATH",
    "imf": f"fetch {IMF}{IMF_FILE} and pass it by --imf-reference FILE",
    "jit": f"fetch {JIT}{JIT_FILE} and pass it by --jit-reference FILE",
}
LARGEST = 2**23
"""Most pixels of an image in a folder: samples are smaller, and a batch must fit into memory."""
NEIGHBOURHOOD = 10_000
"""Real images that precision and recall look at, as many as ADM's file holds; of more, evenly spaced ones."""


@dataclass(frozen=True)
class Sources:
    """Where the references of the protocols are."""

    reference: Path | None = None
    """ADM's VIRTUAL_imagenet256_labeled.npz, or a file of its mu and sigma."""
    data_reference: Path | None = None
    """Reference of own-data: a statistics file, an .npz of images (arr_0) or a folder of images."""
    imf_reference: Path | None = None
    """Reference of imf-jax: imagenet_256_fid_stats.npz, which improved MeanFlow's JAX code comes with."""
    jit_reference: Path | None = None
    """Reference of imf-torch: JiT's jit_in256_stats.npz."""

    def by_kind(self) -> dict[str, Path | None]:
        """The files by the protocols' names of them."""
        return {
            "adm": self.reference, "data": self.data_reference, "imf": self.imf_reference, "jit": self.jit_reference
        }  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """Real data as the scores need it."""

    source: str
    statistics: dict[str, Gaussian]
    """Statistics by the features' names; absent ones cannot be scored."""
    features: Tensor | None
    """pool3 (M, 2048) of real images for precision and recall, where the source holds images."""
    entries: dict | None
    """Account of a folder's used and left-out entries, see meanflow.data.entries.account."""


class ArrayImages:
    """The images of an .npz, arr_0 uint8 (N, H, W, 3), as ADM's files hold them."""

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.array = arrays["arr_0"]
        except Exception as error:  # whatever a broken archive makes its reader raise
            raise UserError(
                f"reference: got {path}, whose images cannot be read ({reason(error)}), wanted arr_0 uint8; "
                "fetch it again or name another"
            ) from None
        fits = self.array.ndim == 4 and self.array.shape[-1] in (1, 3) and self.array.dtype == np.uint8
        fits = fits and self.array.size > 0
        wanted = "images uint8 (N, H, W, 1 or 3)"
        require(fits, f"reference {path}", f"arr_0 {self.array.shape} {self.array.dtype}", wanted, "name another")

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: list[int]) -> Tensor:
        """Read images as uint8 (B, C, H, W)."""
        return torch.from_numpy(self.array[indices]).permute(0, 3, 1, 2)


class FolderImages:
    """The images of a folder and those below it, by name; all of one size, cropped as the samples are.

    What an entry is and how an image is decoded is as in the training data, see meanflow/data: entries and decoding.
    """

    def __init__(self, path: Path):
        self.path, self.entries = path, Entries()
        self.names = sorted(walk(path, "", self.entries), key=lambda name: name.split("/"))
        self.entries.close(len(self.names))
        wanted = "a folder with images " + " ".join(IMAGE_ENDINGS)
        require(bool(self.names), "reference", str(path), wanted, HINTS["data"])
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: list[int]) -> Tensor:
        """Read images as uint8 (B, 3, H, W)."""
        return torch.stack([self._read(self.names[i]) for i in indices])

    def _read(self, name: str) -> Tensor:
        try:
            image, _ = decode(read_file(self.path / name))
        except (OSError, ValueError) as error:
            raise UserError(
                f"reference: got {shown(self.path / name)}, which cannot be read ({reason(error)}), wanted an image; "
                "repair or remove it"
            ) from None
        hint = "crop the images to the samples' size first"
        pixels = image.width * image.height
        require(pixels <= LARGEST, f"reference {shown(name)}", f"{pixels} pixels", f"at most {LARGEST}", hint)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        self.shape = self.shape or tuple(x.shape)
        got, file = tuple(x.shape), f"reference {shown(self.path / name)}"
        require(got == self.shape, file, got, f"{self.shape} as of the others", hint)
        return x


def load_reference(
    kind: str, path: Path | None, extractor: Extractor, resize: str, kept: Path, batch: int, world: World
) -> Reference:
    """Read or compute a reference; a collective call, on the extractor's device.

    Args:
        kind: "adm", "data", "imf" or "jit", the protocol's choice.
        path: an .npz with mu, sigma and perhaps mu_s, sigma_s, or with images arr_0, or both; or a folder of images.
        resize: the protocol's choice, for what is computed here. Statistics that are read are as they are.
        kept: folder where computed features are kept for the next time.

    Raises:
        UserError: for a missing, damaged or empty source.
    """
    got = str(path) if path else "no file"
    require(path is not None and path.exists(), f"reference {kind}", got, FILES[kind], HINTS[kind])
    features, entries = None, None
    if path.is_dir():
        statistics, images = {}, FolderImages(path)
        entries = account(images.entries.left_out(), len(images))
        if world.is_main:
            # standard output is the report's
            print(f"reference {shown(path)}:", "\n".join(describe(entries)), file=sys.stderr)
    else:
        statistics = read_statistics(path, extractor.device)
        held = _check(path, extractor, resize)
        known, wanted = held or "pool3" in statistics, "mu and sigma, or images arr_0"
        require(known, f"reference {kind}", str(path), wanted, HINTS[kind])
        images = ArrayImages(path) if held else None
    if images is not None:
        stat = path.stat()
        identity = {"source": path.resolve(), "size": stat.st_size, "time": stat.st_mtime_ns, "count": len(images)}
        identity = {k: str(v) for k, v in (identity | extractor.identity()).items()}
        measured, features = _measured(images, extractor, resize, kept / f"{kind}-{resize}", identity, batch, world)
        statistics = measured | statistics
    return Reference(str(path), statistics, features, entries)


def _check(path: Path, extractor: Extractor, resize: str) -> bool:
    """Whether an .npz holds images. Raises where its statistics say that they were computed in another way."""
    wanted = {"resize": resize, "inception_sha256": extractor.identity()["inception_sha256"]}
    with np.load(path, allow_pickle=False) as arrays:
        for name, value in wanted.items():
            try:
                got = str(arrays[name]) if name in arrays else value
            except Exception as error:  # whatever a broken archive makes its reader raise
                got = reason(error)
            hint = "it must be that of the samples; compute the statistics again"
            require(got == value, f"reference {path}, {name}", got, value, hint)
        return "arr_0" in arrays


def _measured(
    images: ArrayImages | FolderImages, extractor: Extractor, resize: str, kept: Path, identity: dict, batch: int,
    world: World,
) -> tuple[dict[str, Gaussian], Tensor]:  # fmt: skip
    """Compute statistics of all images and features of some, once; the processes take batches in turn."""
    npz, tensors = kept.with_suffix(".npz"), kept.with_suffix(".safetensors")
    if not world.broadcast(_is_kept(npz, tensors, identity)):
        running = ImageStatistics(extractor, resize)
        every = -(-len(images) // NEIGHBOURHOOD)
        chosen: list[tuple[int, Tensor]] = []
        starts = range(0, len(images), batch)
        for start in tqdm(starts[world.rank :: world.size], desc="reference", disable=not world.is_main):
            indices = list(range(start, min(start + batch, len(images))))
            features = running.add(images.read(indices))["pool3"].cpu()
            chosen += [(i, x) for i, x in zip(indices, features, strict=True) if i % every == 0]
        gathered = sorted((pair for part in world.gather(chosen) for pair in part), key=lambda pair: pair[0])
        running.save(npz, world)
        if world.is_main:
            save_file({"pool3": torch.stack([x for _, x in gathered])}, tensors, identity)
        world.gather(None)  # the files are there
    with safe_open(tensors, "pt") as file:
        features = file.get_tensor("pool3")
    return read_statistics(npz, extractor.device), features.to(extractor.device)


def _is_kept(npz: Path, tensors: Path, identity: dict) -> bool:
    """Whether the files hold results of the same images and networks."""
    try:
        with safe_open(tensors, "pt") as file:
            return npz.exists() and file.metadata() == identity
    except (OSError, SafetensorError):
        return False
