"""Images to latents: decode, crop, encode, and fill a cache's shards, in any number of processes, after any kill."""

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError, require
from ..world import World
from .cache import DTYPES, Builder
from .decoding import Alpha, Exif, centre_crop, decode
from .entries import UNCHOSEN, account, describe, describe_classes, reason, shown
from .sources import Source, fingerprint, open_source
from .vae import identity, load_vae

CROP, REFERENCE = "adm centre crop", "reference.npz"
AHEAD = 4  # batches that are decoded while one is encoded


@dataclass(frozen=True)
class Options:
    """Options of a preparation."""

    image_size: int = 256
    """Side of the cropped images in pixels."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """diffusers' AutoencoderKL: a local folder or a name on the hub."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Dtype of the stored mean and std; the autoencoder computes in fp32 (without TF32)."""
    flipped: bool = False
    """Store the encoding of each mirrored image too, for --data.flip: twice the room."""
    split: str = "train"
    """Subfolder, split or, by their names, tar files of the source that are taken; where it has no splits, train is all
    of it. Empty: all folders are classes, whatever they are called."""
    limit: int | None = None
    """Take only this many images, evenly spread over the source."""
    bad_images: Literal["fatal", "skip"] = "fatal"
    """On an image that cannot be read: stop, or leave it out and list it in the manifest."""
    exif: Exif = "ignore"
    """EXIF's orientation: ignored, or applied."""
    alpha: Alpha = "drop"
    """Transparency: dropped, so that the stored colours show, or laid over white or black."""
    batch: int = 32
    """Images encoded at a time."""
    workers: int = 4
    """Threads per process that decode and crop."""
    shard_rows: int = 8192
    """Images per shard, which is also the most that a killed process must repeat."""
    repair: bool = False
    """Read the existing shards too and write damaged ones again; missing ones are always written."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one; under torchrun each process takes its own."""

    def __post_init__(self):
        for name in ("image_size", "batch", "workers", "shard_rows"):
            value = getattr(self, name)
            require(value >= 1, name, value, "a positive whole number", "change it")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "a positive whole number", "change it")


class Statistics(Protocol):
    """Statistics of images that stream by, such as meanflow.evaluation.features.ImageStatistics."""

    def add(self, images: Tensor) -> object:
        """Add images uint8 (B, 3, H, W)."""

    def save(self, path: Path, world: World) -> None:
        """Write the statistics of all processes' images. A collective call."""


class Decoded(NamedTuple):
    """An image decoded by a worker."""

    crop: np.ndarray | None
    """(size, size, 3) uint8, or None if it cannot be read."""
    mode: str
    """Its stored mode, or why it cannot be read."""
    seconds: float
    """Time spent reading it."""


class Stopwatch:
    """Time of each stage in seconds, and the number of images that went through all of them."""

    def __init__(self, workers: int):
        self.workers, self.start = workers, time.perf_counter()
        self.seconds: Counter[str] = Counter()
        self.images = 0

    @contextmanager
    def __call__(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def __str__(self) -> str:
        total = time.perf_counter() - self.start
        # each worker runs on its own, so together they are that much faster
        share = {"decode": self.workers}
        rates = [f"{stage} {self.images * share.get(stage, 1) / s:.3g}" for stage, s in self.seconds.items() if s]
        return f"{self.images} images in {total:.1f} s, images/s: all {self.images / total:.3g}, " + ", ".join(rates)


class Encoder:
    """An autoencoder's posteriors of uint8 crops."""

    def __init__(self, vae: nn.Module, image_size: int, flipped: bool, device: torch.device):
        self.vae, self.flipped, self.device = vae, flipped, device
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        require(vae.config.in_channels == 3, "vae", vae.config.in_channels, "one of 3 colours", "name another")
        require(image_size % factor == 0, "image_size", image_size, f"a multiple of {factor}", "change it")
        self.shape = (vae.config.latent_channels, image_size // factor, image_size // factor)

    @torch.no_grad()
    def __call__(self, crops: np.ndarray) -> np.ndarray:
        """Encode crops (B, size, size, 3) uint8 -> mean and std (B, copies, 2, C, S, S) fp32."""
        x = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).float()
        x = x.div(127.5).sub(1)  # the bits of the official code's ToTensor and Normalize
        copies = [self._posterior(x)] + ([self._posterior(x.flip(-1))] if self.flipped else [])
        return torch.stack(copies, 1).cpu().numpy()

    def _posterior(self, x: Tensor) -> Tensor:
        posterior = self.vae.encode(x).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of worker threads for a with block; work not begun at its end is dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def batches_of(builder: Builder, shards: list[int], size: int) -> list[range]:
    """Cut the members of shards into batches that do not cross shards: a shard's bytes depend on it alone."""
    members = map(builder.members, shards)
    return [part[i : i + size] for part in members for i in range(0, len(part), size)]


def in_order(pool: ThreadPoolExecutor, work: Callable, batches: Iterable[Sequence], ahead: int) -> Iterator[list]:
    """Yield the results of work on each batch's items, in order, with `ahead` batches under way."""
    pending: deque = deque()
    for batch in batches:
        pending.append([pool.submit(work, item) for item in batch])
        if len(pending) > ahead:
            yield [future.result() for future in pending.popleft()]
    while pending:
        yield [future.result() for future in pending.popleft()]


def fill(
    folder: Path, job: dict, world: World, repair: bool, make: Callable[[Builder, list[int]], Any], left_out: dict
) -> dict | None:
    """Complete a cache: each process makes its share of missing shards; returns the manifest, in the first process.

    Args:
        left_out: of the source's entries, see meanflow.data.entries.Entries.left_out.

    Raises:
        UserError: for a folder that holds another job.
    """
    builder = Builder(folder, job)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(builder.alone())
            builder.begin()
        missing = world.broadcast(builder.missing(read=repair) if world.is_main else None)
        builder.check()
        done = builder.shards - len(missing)
        if world.is_main and done:
            print(f"{folder}: {done} of {builder.shards} shards are whole, {len(missing)} are made")
        make(builder, missing[world.rank :: world.size])
        world.gather(None)  # a barrier: from here on all shards are there
        return builder.finish(left_out) if world.is_main else None


def progress(builder: Builder, shards: list[int], world: World) -> tqdm:
    """A progress bar of this process's images, shown by the first process alone."""
    total = sum(len(builder.members(shard)) for shard in shards)
    name = builder.folder.name + (f", process 1 of {world.size}" if world.size > 1 else "")
    return tqdm(total=total, unit="img", desc=name, disable=not world.is_main, dynamic_ncols=True, mininterval=1.0)


class Preparation:
    """A source being encoded into a folder."""

    def __init__(self, name: str, folder: Path, options: Options, world: World):
        self.folder, self.options, self.world = folder, options, world
        self.source: Source = open_source(name, options.split)
        available, limit = len(self.source.names), options.limit
        wanted = available if limit is None else min(limit, available)
        self.chosen = np.arange(wanted) * available // wanted
        for i in sorted(set(range(available)) - set(self.chosen.tolist())):
            self.source.entries.leave_out(self.source.names[i], UNCHOSEN)
        vae = load_vae(options.vae, world.device, "vae")
        self.encoder = Encoder(vae, options.image_size, options.flipped, world.device)
        self.job = self._job(name, vae)
        self.stopwatch = Stopwatch(options.workers)

    def _job(self, name: str, vae: nn.Module) -> dict:
        import diffusers
        import PIL

        options, source = self.options, self.source
        labels = source.labels[self.chosen].tolist()
        listed = fingerprint((source.names[i] for i in self.chosen), labels)
        return {
            "source": {"kind": source.kind, "path": name, "split": options.split, "sha256": listed},
            "count": len(self.chosen),
            "classes": source.classes,
            "vae": identity(options.vae, vae),
            "crop": CROP,
            "exif": options.exif,
            "alpha": options.alpha,
            "image_size": options.image_size,
            "pixels": "symmetric",
            "latent_shape": self.encoder.shape,
            "dtype": options.dtype,
            "flipped": options.flipped,
            "batch": options.batch,
            "shard_rows": options.shard_rows,
            "device": self.world.device.type,
            "software": {"torch": torch.__version__, "diffusers": diffusers.__version__, "pillow": PIL.__version__},
        }

    def run(self) -> dict | None:
        """Encode what is missing; returns the manifest, in the first process.

        Raises:
            UserError: for an image that cannot be read, latents that are not finite, a folder that holds another job.
        """
        left_out = self.source.entries.left_out()
        if self.world.is_main:
            # before hours of encoding
            classes = describe_classes(self.source.labels[self.chosen].tolist(), self.source.classes)
            lines = [*describe(account(left_out, len(self.chosen))), classes]
            print(f"{shown(self.job['source']['path'])}: " + "\n".join(lines))
        return fill(self.folder, self.job, self.world, self.options.repair, self._make, left_out)

    def measure(self, statistics: Statistics) -> None:
        """Write the statistics of all readable images to reference.npz. A collective call."""
        images, batch, world = range(len(self.chosen)), self.options.batch, self.world
        batches = [images[i : i + batch] for i in range(0, len(images), batch)][world.rank :: world.size]
        with threads(self.options.workers) as pool:
            decoded = in_order(pool, self._decode, batches, AHEAD)
            for part in tqdm(decoded, "reference.npz", len(batches), unit="batch", disable=not world.is_main):
                if crops := [image.crop for image in part if image.crop is not None]:
                    statistics.add(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))
        statistics.save(self.folder / REFERENCE, world)

    def _make(self, builder: Builder, shards: list[int]) -> None:
        with threads(self.options.workers) as pool, progress(builder, shards, self.world) as bar:
            decoded = in_order(pool, self._decode, batches_of(builder, shards, self.options.batch), AHEAD)
            for shard in shards:
                self._make_shard(builder, shard, decoded, bar)

    def _decode(self, member: int) -> Decoded:
        start = time.perf_counter()
        try:
            image, mode = decode(self.source.read(int(self.chosen[member])), self.options.exif, self.options.alpha)
            crop = np.asarray(centre_crop(image, self.options.image_size))
        except Exception as error:  # from the file system, the package datasets or the decoder
            crop, mode = None, reason(error)
        return Decoded(crop, mode, time.perf_counter() - start)

    def _make_shard(self, builder: Builder, shard: int, decoded: Iterator[list[Decoded]], bar: tqdm) -> None:
        members, batch = builder.members(shard), self.options.batch
        copies = 2 if self.options.flipped else 1
        latents = np.empty((len(members), copies, 2, *self.encoder.shape), DTYPES[self.options.dtype])
        rows, skipped, converted = [], [], Counter()
        for start in range(0, len(members), batch):
            part = members[start : start + batch]
            images = next(decoded)
            self.stopwatch.seconds["decode"] += sum(image.seconds for image in images)
            good = [(member, image) for member, image in zip(part, images, strict=True) if image.crop is not None]
            skipped += [[self._name(m), i.mode] for m, i in zip(part, images, strict=True) if i.crop is None]
            if skipped and self.options.bad_images == "fatal":
                raise UserError(
                    f"source: got {shown(skipped[0][0])}, which cannot be read ({skipped[0][1]}), wanted an image; "
                    "repair it, or leave such images out by --bad-images skip"
                )
            converted.update(image.mode for _, image in good if image.mode != "RGB")
            if good:
                with self.stopwatch("encode"):
                    encoded = self.encoder(np.stack([image.crop for _, image in good]))
                latents[len(rows) : len(rows) + len(good)] = self._finite(encoded, [member for member, _ in good])
                rows += [member for member, _ in good]
            self.stopwatch.images += len(part)
            bar.update(len(part))
        with self.stopwatch("write"):
            builder.put(
                shard, latents[: len(rows)], self.source.labels[self.chosen[np.array(rows, int)]], skipped, converted
            )

    def _finite(self, encoded: np.ndarray, members: list[int]) -> np.ndarray:
        with np.errstate(over="ignore"):
            encoded = encoded.astype(DTYPES[self.options.dtype])
        good = np.isfinite(encoded).reshape(len(encoded), -1).all(1)
        if not good.all():
            name = self._name(members[int(np.argmin(good))])
            raise UserError(
                f"vae: got latents of {shown(name)} that are not finite in {self.options.dtype}, wanted numbers; "
                f"name another autoencoder than {self.options.vae!r}, or take --dtype fp32"
            )
        return encoded

    def _name(self, member: int) -> str:
        return self.source.names[int(self.chosen[member])]


def prepare(
    source: str, folder: Path, options: Options, statistics: Callable[[torch.device], Statistics] | None = None
) -> dict | None:
    """Encode a source's images into a latent cache, resuming what it holds; returns the manifest, in the first process.

    Args:
        statistics: makes the statistics that a second pass over the cropped images fills, saved as reference.npz
            beside the latents.

    Raises:
        UserError: for a source without images or a damaged one, an autoencoder that does not fit, another job's folder.
    """
    # a GPU would otherwise round convolutions to TF32, and differently from run to run
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decoding.py bounds what large images take
    with World(options.device) as world:
        # weights that are refused are found before hours of encoding
        measured = statistics(world.device) if statistics else None
        preparation = Preparation(source, folder, options, world)
        manifest = preparation.run()
        if preparation.stopwatch.images:
            process = f"process {world.rank + 1} of {world.size}: " if world.size > 1 else ""
            print(f"{process}{preparation.stopwatch} ({options.workers} decoding threads)")
        if measured and not world.broadcast((folder / REFERENCE).exists()):
            preparation.measure(measured)
        return manifest
