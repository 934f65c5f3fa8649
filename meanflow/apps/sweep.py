"""Find the guidance that a trained network of improved MeanFlow samples best with, without training it again.

python scripts/sweep.py runs/digits-imf   (digits, by their distance: minutes on a CPU)

python scripts/sweep.py runs/imf-b2 --inception FILE --reference FILE   (latents, by their FID)

python scripts/sweep.py RUN ... --omegas 7 8 9 --intervals 0.4-0.65   (more points, beside those that are done)

Each point of the grid, a scale omega and the times where guidance acts, is scored on the same noise. Repeating an
interrupted command continues it. Several GPUs: torchrun --nproc-per-node 8 scripts/sweep.py RUN ...
"""

import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import cli
from ..config import RunConfig
from ..data.decoder import make_decoder
from ..errors import require
from ..evaluation.classifier import ClassifierJudge
from ..evaluation.evaluator import Evaluator, claim, schedule_name
from ..evaluation.features import Extractor
from ..evaluation.fid_reference import load_reference
from ..evaluation.protocols import named
from ..evaluation.search import Score, best, grid, in_words, measure, sweep
from ..interop.formats import home
from ..method.sampling import even_times
from ..owner import owned
from ..world import World
from .evaluate import Judging

ROWS, PICTURE = "rows.jsonl", "heat_map.png"


@dataclass(frozen=True)
class Options(Judging):
    omegas: tuple[float, ...] = (1, 2, 3, 4, 6, 8)
    """Scales to try, 1 or more; 1 is no guidance. Training draws them up to objective.omega_max."""
    intervals: tuple[str, ...] = ("0-1", "0.2-0.8", "0.3-0.7", "0.4-0.65")
    """Times where guidance acts, as START-END, to try each scale with."""
    steps: int = 1
    """Evaluations of the network per image, evenly spaced in time: each number has a best point of its own."""
    count: int = 10_000
    """Samples of a point, for the FID, which falls as they grow: compare points of equal counts alone."""
    protocol: str = "official"
    """How the FID is measured: one name of evaluate.py's --protocols, or several joined by +."""
    out: Path | None = None
    """Where rows and heat map are written (default: RUN/sweep/, by step, schedule and seed)."""


def summary(options: Options, rows: list[dict]) -> list[str]:
    """The best point, and the commands that sample and evaluate with it."""
    found = best(rows)
    omega, *_ = found["guidance"]
    tried = sorted({row["guidance"][0] for row in rows})
    told = " ".join(f"{x:g}" for x in found["guidance"])
    words = f"{shlex.quote(str(options.checkpoint))} --steps {options.steps} --guidance {told}"
    lines = [f"best of {len(rows)} points: {in_words(found)}"]
    if omega == tried[-1] > 1 or omega == tried[0] > 1:
        further = f"--omegas {max(1, omega * 0.75):g} {omega * 1.5:g}"
        lines.append(f"It lies at the edge of the scales tried: {further} tries further ones beside them.")
    return [*lines, f"    python scripts/sample.py {words}", f"    python scripts/evaluate.py {words}"]


def draw(path: Path, rows: list[dict]) -> None:
    """Draw the scores as a heat map, scales to the right and intervals downwards, the best one framed."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    omegas = sorted({row["guidance"][0] for row in rows})
    intervals = sorted({tuple(row["guidance"][1:]) for row in rows}, key=lambda x: (x[1:2] < x[:1], x))
    values = torch.full((len(intervals), len(omegas)), torch.nan)
    for row in rows:
        omega, *interval = row["guidance"]
        values[intervals.index(tuple(interval)), omegas.index(omega)] = measure(row)[1]
    figure = Figure(figsize=(2.5 + 0.75 * len(omegas), 1.8 + 0.45 * len(intervals)), layout="constrained")
    axes, known = figure.subplots(), values[~values.isnan()]
    image = axes.imshow(values.numpy(), cmap="viridis_r", norm=LogNorm() if known.max() > 5 * known.min() else None)
    image.set_clim(float(known.min()), float(known.max()))
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            dark = image.norm(value) > 0.5
            if value == value:
                axes.text(j, i, f"{value:.4g}", ha="center", va="center", color="white" if dark else "black")
    omega, *interval = best(rows)["guidance"]
    corner = omegas.index(omega) - 0.5, intervals.index(tuple(interval)) - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    axes.set_xticks(range(len(omegas)), [f"{omega:g}" for omega in omegas])
    axes.set_yticks(range(len(intervals)), ["{:g} to {:g}".format(*x) if x else "all times" for x in intervals])
    axes.set_xlabel("scale of the guidance, omega")
    axes.set_ylabel("times where it acts")
    name = {"fid": "FID", "frechet": "Fréchet distance, digits"}[measure(rows[0])[0]]
    figure.colorbar(image, label=name)
    axes.set_title(in_words(best(rows)))
    figure.savefig(path, dpi=150)


def make_score(
    options: Options, net: torch.nn.Module, config: RunConfig, extractor: Extractor | None, out: Path, world: World
) -> Score:
    """Make a function from what the network is told to its scores by name, which all processes call together.

    extractor: of the features for the FID; without one a classifier judges. out: where the reference's are kept.
    """
    times = even_times(options.steps)
    if extractor is None:
        judge = ClassifierJudge(config.data, options.seed)
        return lambda guidance: judge.score_net(net, world.device, times, guidance).as_dict()
    protocol = named(options.protocol)
    source, kept = options.sources.by_kind()[protocol.reference], out / "reference"
    reference = load_reference(protocol.reference, source, extractor, protocol.resize, kept, options.batch, world)
    decode = make_decoder(config.data, world.device)
    shape, classes = (net.in_channels, net.input_size, net.input_size), config.model.num_classes
    about = {"protocol": protocol, "batch": options.batch, "seed": options.seed, "world": world}

    def score(guidance: tuple[float, ...]) -> dict[str, float]:
        judge = Evaluator(extractor, reference, decode, shape, classes, guidance=guidance, **about)
        return judge.score(net, options.count, times)

    return score


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="sweep.py", description=__doc__)
    require(options.count >= 2, "count", options.count, "at least 2 samples", "change it")
    require(options.batch >= 1, "batch", options.batch, "a positive whole number", "change it")
    times, protocol = even_times(options.steps), named(options.protocol)
    with World(options.device) as world:
        net, config, path, step = options.load(world.device)
        points = grid(options.omegas, options.intervals, config)
        settings = options.settings(net, step)
        name = f"step{step}_{schedule_name(times)}_seed{options.seed}_{options.precision}"
        if options.by_classifier(config):
            extractor = None
        else:
            extractor = Extractor(options.inception, world.device)
            source = options.sources.by_kind()[protocol.reference]
            settings |= {"count": options.count, "reference_source": str(source)}
            settings |= protocol.describe() | extractor.identity()
            name += f"_{options.protocol}_count{options.count}"
        settings |= {"times": list(times)}
        out = options.out or home(path) / "sweep" / name
        with owned(out) if world.is_main else nullcontext():
            claim(out, settings, world)
            rows = sweep(points, make_score(options, net, config, extractor, out, world), out / ROWS, world)
            if world.is_main:
                draw(out / PICTURE, rows)
                print("\n".join([*summary(options, rows), f"{out / ROWS}   {out / PICTURE}"]))


run = partial(cli.run, main)
