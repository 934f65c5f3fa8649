"""Generate images from a trained model: a PNG grid and an .npz."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import Positional

from .. import cli
from ..data.decoder import make_decoder
from ..data.images import captioned, save_png, to_uint8
from ..draws import Draws
from ..errors import UserError, require
from ..interop.formats import home, known_names, read_names
from ..interop.weights import load_ema
from ..method.guidance import sampling_guidance
from ..method.sampling import check_times, even_times, generate
from ..world import choose_device


@dataclass(frozen=True)
class Options:
    checkpoint: Positional[Path]
    """A run folder, whose last checkpoint is taken, a checkpoint, exported weights, or a folder of a saved pipeline."""
    count: int = 80
    """Number of images."""
    steps: int = 1
    """Evaluations of the network per image, evenly spaced in time."""
    times: tuple[float, ...] = ()
    """A schedule of one's own instead, falling from 1 to 0."""
    guidance: tuple[float, ...] = ()
    """What a network that is told of its guidance is told: omega, and where guidance begins and ends (default: the
    run's evaluation.guidance, else the official best of its size in one step; of XL/2 in two steps it is 4 0.36 0.64;
    sweep.py finds a run's own)."""
    labels: tuple[int, ...] = ()
    """Classes to draw, repeated in turn; default: all of the model's, in turn."""
    seed: int = 0
    """Seed of the noise: the same seed gives the same images, however many are drawn."""
    batch: int = 64
    """Images generated at a time."""
    columns: int = 10
    """Columns of the grid."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    out: Path | None = None
    """Where to write, without the ending (default: in RUN/generated, by step, times, guidance, classes ...)."""
    overwrite: bool = False
    """Write over what is there."""
    names: str = ""
    """Names of the classes, for the grid: "imagenet", a JSON file {number: name}, or a file with a name a line
    (default: those of the run's data, or numbers)."""


def name_of(options: Options, step: int, guidance: tuple[float, ...] = ()) -> str:
    """Name of the files: what is drawn, and from which weights."""
    words = [f"step{step}", f"nfe{options.steps}", f"seed{options.seed}"]
    if options.times:
        words[1] = "times" + "-".join(f"{t:g}" for t in options.times)
    if guidance:
        words.append("guidance" + "-".join(f"{x:g}" for x in guidance))
    if options.labels:
        labels = "-".join(map(str, options.labels))
        short = f"{len(options.labels)}of{hashlib.sha256(labels.encode()).hexdigest()[:8]}"
        words.append("classes" + (labels if len(labels) <= 60 else short))
    return "_".join([*words, f"count{options.count}"])


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="sample.py", description=__doc__)
    for name in ("count", "batch", "columns"):
        require(getattr(options, name) >= 1, name, getattr(options, name), "a positive whole number", "change it")
    require(options.steps >= 1, "steps", options.steps, "a positive whole number", "1 is one-step generation")
    times = check_times(options.times) if options.times else even_times(options.steps)
    device = choose_device(options.device)
    net, config, path, step = load_ema(options.checkpoint, device)
    guidance = sampling_guidance(config.model, config.objective, options.guidance or config.evaluation.guidance)

    classes = config.model.num_classes
    for label in options.labels:
        require(0 <= label < classes, "labels", label, f"classes from 0 to {classes - 1}", "correct it")
    out = options.out or home(path) / "generated" / name_of(options, step, guidance)
    targets = [out.with_name(out.name + ending) for ending in (".png", ".npz")]
    for target in targets:
        free, hint = options.overwrite or not target.exists(), "name another by --out, or take --overwrite"
        require(free, "out", str(target), "a file that does not exist yet", hint)
    names = read_names(options.names) if options.names else known_names(path)

    pool = torch.tensor(options.labels or range(classes))
    labels = pool[torch.arange(options.count) % len(pool)]
    decode, images = make_decoder(config.data, device), []
    bar = tqdm(total=options.count, unit="img", desc=out.name, delay=1.0, dynamic_ncols=True)
    for part in torch.arange(options.count).split(options.batch):
        draws, shape = Draws(options.seed, 0, part.to(device)), (net.in_channels, *[net.input_size] * 2)
        images.append(to_uint8(decode(generate(net, draws, shape, labels[part].to(device), times, guidance))).cpu())
        bar.update(len(part))
    bar.close()
    pixels = torch.cat(images)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        captions = [names.get(str(label), str(label)) for label in labels.tolist()]
        save_png(targets[0], captioned(pixels, captions, options.columns, zoom=max(1, 32 // pixels.shape[-1])))
        np.savez(targets[1], images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    except OSError as error:
        raise UserError(
            f"out: got {out}, which cannot be written ({error}), wanted a writable folder; name another"
        ) from None
    schedule = " ".join(f"{t:g}" for t in times)
    print(f"{options.count} images, {len(times) - 1} evaluation(s) each, times {schedule}: {targets[0]}, {targets[1]}")


run = partial(cli.run, main)
