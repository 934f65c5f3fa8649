"""Evaluation of generators: samples, their features kept on disk batch by batch, scores by named protocols.

An interrupted evaluation resumes where it stopped: a batch of samples is a function of (weights, seed, indices), and
its features are written whole or not at all. Any number of processes computes the same files; one scores.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..data.images import grid, save_png
from ..draws import Draws
from ..errors import UserError, require
from ..method.sampling import even_times, generate
from ..storage.record import environment, write_atomically
from ..world import World
from .features import Extractor, exact
from .fid_reference import Reference, load_reference
from .frechet import Moments, frechet_distance, merge
from .protocols import OFFICIAL, Protocol, labels_of, quantize
from .scores import BLOCKS, NEIGHBOURS, SPLIT, frechet_score, inception_score, precision_recall

FRECHET = {"fid": "pool3", "sfid": "spatial", "fdd": "dinov2"}
"""Fréchet distances, each with its features."""
NOTES = (
    "Frechet distances fall as the number of images grows: compare numbers of equal counts alone.",
    (
        f"stderr: Frechet distances, delete-one-block jackknife over {BLOCKS} blocks of samples; precision and recall, "
        f"means of {BLOCKS} blocks; inception_score, splits of {SPLIT} samples in order (ADM; none for one split) "
        "or ten shuffled ones. "
        "interval: 95 %, of the samples' draw, without the reference's own error."
    ),
    (
        "inception_score: logits without bias over 1008 outputs. precision and recall: "
        f"k = {NEIGHBOURS}, pool3, fp32 distances."
    ),
)
GRID = 64


@dataclass(frozen=True)
class Sampler:
    """Images as a function of (seed, index): any number of processes, batches and resumes draw the same noise."""

    net: nn.Module
    decode: Callable[[Tensor], Tensor]
    """Maps latents to images in [-1, 1], see meanflow.data.decoder.make_decoder."""
    shape: tuple[int, int, int]
    """Shape of a latent."""
    num_classes: int
    seed: int
    device: torch.device
    guidance: tuple[float, ...] = ()
    """What the network is told of it."""

    def images(self, indices: Tensor, labels: str, times: Sequence[float]) -> Tensor:
        """Draw samples (B, C, H, W) of indices (B,), about in [-1, 1]; labels: the protocol's choice.

        Raises:
            UserError: if they are not finite.
        """
        draws = Draws(self.seed, 0, indices.to(self.device))
        classes = labels_of(labels, draws, self.num_classes)
        images = self.decode(generate(self.net, draws, self.shape, classes, times, self.guidance))
        finite, hint = bool(images.isfinite().all()), "did the run diverge, or is the precision too low?"
        require(finite, "samples", "values that are not finite", "finite images", hint)
        return images


# --- while training ---


class Evaluator:
    """Scores a network in memory, for a trainer: the same samples each time, all processes together.

        evaluator = Evaluator(extractor, reference, decode, shape, num_classes, world=world)
        row = evaluator.score(ema, 5000)  # {"fid": ..., "sfid": ...}; in every process

    Args:
        extractor: feature networks on this process's device.
        reference: the real data, see :func:`meanflow.evaluation.fid_reference.load_reference`.
        decode, shape, num_classes, seed, guidance: see :class:`Sampler`.
        protocol: labels, rounding and resize; its reference is the one given.
        batch: samples at a time in each process.
    """

    def __init__(
        self, extractor: Extractor, reference: Reference, decode: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int], num_classes: int, *, world: World, protocol: Protocol = OFFICIAL, batch: int = 64,
        seed: int = 0, guidance: tuple[float, ...] = (),
    ):  # fmt: skip
        self.extractor, self.reference, self.protocol = extractor, reference, protocol
        self.decode, self.shape, self.num_classes, self.seed = decode, shape, num_classes, seed
        self.world, self.batch, self.guidance = world, batch, guidance

    def score(self, net: nn.Module, count: int, times: Sequence[float] = (1.0, 0.0)) -> dict[str, float]:
        """Compute Fréchet distances of count samples, by name; the same in every process. A collective call."""
        about = (self.seed, self.world.device, self.guidance)
        sampler = Sampler(net, self.decode, self.shape, self.num_classes, *about)
        moments: dict[str, Moments] = {}
        batches = torch.arange(count).split(self.batch)
        # as many passes in each process: a pass of a sharded network is a collective call too
        for first in range(0, len(batches), self.world.size):
            mine = first + self.world.rank
            images = sampler.images(batches[min(mine, len(batches) - 1)], self.protocol.labels, times)
            if mine < len(batches):
                images = quantize(images, self.protocol.rounding)
                for name, x in self.extractor(images, self.protocol.resize).items():
                    part = Moments.of(x)
                    moments[name] = moments[name].merged(part) if name in moments else part
        parts = [part for part in self.world.gather({n: m.to("cpu") for n, m in moments.items()}) if part]
        scores = {}
        for score, name in FRECHET.items():
            if name in parts[0] and name in self.reference.statistics:
                of = self.reference.statistics[name]
                whole = merge([part[name] for part in parts]).to(of.mean.device)
                scores[score] = frechet_distance(whole.gaussian(), of)
        return scores


# --- the whole evaluation ---


@dataclass(frozen=True)
class Plan:
    """What an evaluation measures."""

    count: int
    """Number of samples for each schedule and choice of labels."""
    schedules: tuple[tuple[float, ...], ...]
    """Times of the sampler, falling from 1 to 0."""
    protocols: dict[str, Protocol]
    """Protocols by name."""
    batch: int = 64
    """Samples generated at a time, which affects the scores' last bits."""

    def __post_init__(self):
        least = 2 * BLOCKS
        require(self.count >= least, "count", self.count, f"at least {least} samples", "standard errors need them")
        require(self.batch >= 1, "batch", self.batch, "a positive whole number", "change it")

    def batches(self) -> list[tuple[int, int]]:
        """First and end index of each batch."""
        return [(i, min(i + self.batch, self.count)) for i in range(0, self.count, self.batch)]

    def work(self) -> list[tuple[tuple[float, ...], str, tuple[int, int]]]:
        """List schedule, labels and index range of all batches to draw."""
        kinds = dict.fromkeys(p.labels for p in self.protocols.values())
        return [(times, labels, span) for times in self.schedules for labels in kinds for span in self.batches()]

    def views(self, labels: str) -> list[tuple[str, str]]:
        """The (rounding, resize) pairs that the protocols with these labels use."""
        return list(dict.fromkeys((p.rounding, p.resize) for p in self.protocols.values() if p.labels == labels))


def schedule_name(times: Sequence[float]) -> str:
    """Name a schedule in file names: the number of steps, and their times if they are not even."""
    steps = len(times) - 1
    if tuple(times) == even_times(steps):
        return f"nfe{steps}"
    return f"nfe{steps}-{hashlib.sha256(repr(tuple(times)).encode()).hexdigest()[:8]}"


def claim(folder: Path, identity: dict, world: World) -> None:
    """Make a folder that of one evaluation, which settings.json tells; one that is there already goes on.

    Raises:
        UserError: if the folder holds an evaluation of something else.
    """
    path = folder / "settings.json"
    held = json.loads(path.read_text()) if path.exists() else identity
    for name, value in identity.items():
        wanted = f"{held.get(name)!r}, as in the evaluation that {folder} holds"
        require(held.get(name) == value, name, value, wanted, "name another folder by --out")
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=2) + "\n")


class FeatureStore:
    """Features on disk: a file for each batch of samples and (rounding, resize), whole or absent.

    Raises:
        UserError: if the folder holds an evaluation of something else.
    """

    def __init__(self, folder: Path, identity: dict, world: World):
        self.folder = folder
        claim(folder, identity, world)

    def path(self, times: Sequence[float], labels: str, view: tuple[str, str], span: tuple[int, int]) -> Path:
        """The file of a batch."""
        schedule = "-".join(str(float(t)) for t in times)
        return (
            self.folder / "features" / schedule / labels / "-".join(view) / f"{span[0]:08d}-{span[1]:08d}.safetensors"
        )

    def write(self, path: Path, features: dict[str, Tensor]) -> None:
        """Write a batch's features atomically."""
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: x.float().cpu().contiguous() for name, x in features.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"out: got {path}, which cannot be written ({error}), wanted room in a writable folder; make room and "
                "repeat the command to go on"
            ) from None

    def read(self, paths: list[Path]) -> dict[str, Tensor]:
        """Read all features of these batches by name, (count, D) fp32 on the CPU."""
        parts = []
        for path in paths:
            try:
                parts.append(load_file(path))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"out: got {path}, which cannot be read ({error}), wanted features written here; remove it and "
                    "repeat the command"
                ) from None
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def evaluate(
    sampler: Sampler, extractor: Extractor, plan: Plan, sources: dict[str, Path | None], out: Path, identity: dict,
    world: World,
) -> dict | None:  # fmt: skip
    """Draw the samples, score them and write report.json and a grid of samples. A collective call.

    Args:
        sources: where the references "adm" and "data" are; only those that the protocols name are needed.
        out: folder, continued where it holds the same evaluation; the processes must share it.
        identity: what the samples depend on (weights, seed, ...): a folder holds one such thing.

    Returns:
        the report, in the first process; None in others.

    Raises:
        UserError: for missing references, a folder that holds something else, samples that are not finite.
    """
    identity = identity | {"batch": plan.batch, **extractor.identity()}
    store = FeatureStore(out, identity, world)
    world.gather(None)  # the folder is there
    references = {}
    for p in plan.protocols.values():
        key = p.reference, p.resize
        if key not in references:
            references[key] = load_reference(
                p.reference, sources[p.reference], extractor, p.resize, out / "reference", plan.batch, world
            )
    _draw(sampler, extractor, plan, store, world)
    world.gather(None)  # all files are there
    if not world.is_main:
        return None
    asked = [(times, name) for times in plan.schedules for name in plan.protocols]
    rows = [
        _score(store, extractor, plan, name, times, references)
        for times, name in tqdm(asked, desc="scores", unit="protocol", dynamic_ncols=True)
    ]
    report = identity | {"count": plan.count, "results": rows, "notes": list(NOTES), "environment": environment()}
    report["reference_entries"] = {r.source: r.entries for r in references.values() if r.entries}
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def _draw(sampler: Sampler, extractor: Extractor, plan: Plan, store: FeatureStore, world: World) -> None:
    """Compute missing features, processes taking batches in turn, and picture the first batch of each kind."""
    mine = plan.work()[world.rank :: world.size]
    bar = tqdm(mine, desc="samples", unit="batch", disable=not world.is_main, dynamic_ncols=True, mininterval=1.0)
    for times, labels, span in bar:
        paths = {view: store.path(times, labels, view, span) for view in plan.views(labels)}
        picture = store.folder / f"samples_{schedule_name(times)}_{labels}.png"
        missing = [view for view, path in paths.items() if not path.exists()]
        if not missing and (span[0] or picture.exists()):
            continue
        with exact():
            images = sampler.images(torch.arange(*span), labels, times)
        for rounding, resize in missing:
            store.write(paths[rounding, resize], extractor(quantize(images, rounding), resize))
        if not span[0]:
            columns = min(8, len(images))
            shown = quantize(images[:GRID], OFFICIAL.rounding).cpu()
            save_png(picture, grid(shown, columns), zoom=max(1, 32 // images.shape[-1]))


def _score(
    store: FeatureStore, extractor: Extractor, plan: Plan, name: str, times: Sequence[float],
    references: dict[tuple[str, str], Reference],
) -> dict:  # fmt: skip
    """Compute a protocol's scores at one schedule, beside everything that they depend on."""
    protocol = plan.protocols[name]
    reference = references[protocol.reference, protocol.resize]
    view = protocol.rounding, protocol.resize
    features = store.read([store.path(times, protocol.labels, view, span) for span in plan.batches()])
    scores = {
        score: frechet_score(features[kind], reference.statistics[kind]).as_dict()
        for score, kind in FRECHET.items()
        if kind in features and kind in reference.statistics
    }
    scores["inception_score"] = inception_score(extractor.probabilities(features["pool3"]), protocol.splits).as_dict()
    if reference.features is not None:
        shares = precision_recall(features["pool3"].to(extractor.device), reference.features)
        scores |= {key: share.as_dict() for key, share in zip(("precision", "recall"), shares, strict=True)}
    return {
        "protocol": name,
        **protocol.describe(),
        "reference_source": reference.source,
        "count": plan.count,
        "evaluations": len(times) - 1,
        "times": list(times),
        **scores,
    }


def table(report: dict) -> str:
    """Format the report as lines for a terminal, with each number's protocol and its meaning."""
    names = ("fid", "sfid", "fdd", "inception_score", "precision", "recall")
    present = [name for name in names if any(name in row for row in report["results"])]
    lines = []
    for row in report["results"]:
        numbers = [f"{name} {_number(row[name])}" for name in present if name in row]
        choices = ", ".join(str(row[axis]) for axis in ("reference", "labels", "rounding", "resize"))
        measured = f"{row['protocol']} ({choices}), {row['evaluations']} step(s), {row['count']} images"
        lines.append(f"{measured}: {'; '.join(numbers)}")
    if not report["inception_is_standard"]:
        found = report["inception_sha256"][:8]
        lines.append(
            f"The Inception's weights are not the standard ones (SHA-256 {found}...): no published number compares."
        )
    return "\n".join([*lines, NOTES[0]])


def _number(score: dict) -> str:
    half = "" if score["interval"] is None else f" ± {score['interval'][1] - score['value']:.2g}"
    return f"{score['value']:.4f}{half}"
