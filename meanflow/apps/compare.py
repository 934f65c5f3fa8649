"""Compare objectives trained at equal FLOPs: table and picture beside the figures published for ImageNet.

python scripts/compare.py --data digits                                all of them, three seeds

python scripts/compare.py --objectives meanflow soflow --steps 600     two of them, at equal steps

python scripts/compare.py --data fashion                               Fashion-MNIST, one seed

Each is trained by its preset, once a seed, and judged in 1, 2 and 4 steps by its own sampler. Where a network is told
its guidance, the best of a few is found on the first seed's, after training. Repeating an interrupted command continues
it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .. import cli
from ..config import ObjectiveConfig, OptimConfig, RunConfig
from ..errors import require
from ..evaluation import search
from ..evaluation.classifier import ClassifierJudge, draw_grids, grid_of, real_grid, spread
from ..interop.weights import load_ema
from ..method.sampling import even_times
from ..method.views import Euler
from ..objectives.build import make_objective
from ..owner import owned
from ..presets import preset
from ..storage.record import environment, write_atomically
from ..training.flops import sample_flops, step_flops
from ..training.runlog import cost_of
from ..training.trainer import train_all
from ..world import World

STEPS_OF_SAMPLES = (1, 2, 4)
COLUMNS = 4
"""Grids of samples beside each other."""
OMEGAS, INTERVALS = (1.0, 1.25, 1.5, 2.0), ("0-1",)
"""The guidance that is tried on a network that is told it: digits want little."""


@dataclass(frozen=True)
class Entry:
    """An objective in the comparison."""

    preset: str
    """What stands behind the data's name."""
    label: str
    published: float | None
    """FID of one-step samples on ImageNet 256x256."""
    whose: str
    """The network of that figure, and whose run it is."""


ENTRIES = {
    "meanflow": Entry("", "MeanFlow", 6.17, "B/2, 240 epochs, MeanFlow's paper"),
    "imf": Entry("-imf-adaln", "improved MeanFlow", 3.82, "B/2, 240 epochs, iMF's paper"),
    "imf-tokens": Entry("-imf", "improved MeanFlow, conditions as tokens", 3.82, "B/2, 240 epochs, iMF's paper"),
    "flow-matching": Entry("-flow-matching", "flow matching", 328.91, "B/4, 80 epochs, MeanFlow's paper"),
    "soflow": Entry("-soflow", "SoFlow", 4.85, "B/2, 240 epochs, SoFlow's paper"),
    "shortcut": Entry("-shortcut", "shortcut models", 40.3, "B/2, 800,000 steps, their paper"),
    "ict": Entry("-ict", "iCT", 34.24, "XL/2, IMM's paper"),
    "scm": Entry("-scm", "sCM", None, "none published"),
    "imm": Entry("-imm", "IMM", 7.77, "XL/2, IMM's paper, guided by a second call"),
    "alpha-flow": Entry("-alpha-flow", "alpha-Flow", 5.40, "B/2, 240 epochs, alpha-Flow's paper"),
}
"""By name."""


@dataclass(frozen=True)
class Data:
    """What is trained on."""

    real: str
    """The real pictures, in words."""
    seeds: tuple[int, ...]
    """Of each training, unless others are asked for."""


DATA = {"digits": Data("real digits", (0, 1, 2)), "fashion": Data("real Fashion-MNIST", (0,))}
"""By the name of MeanFlow's preset."""


@dataclass(frozen=True)
class Options:
    data: Literal["digits", "fashion"] = "digits"
    """What to train on."""
    path: str = ""
    """Folder of Fashion-MNIST, as train.py's --data.path."""
    objectives: tuple[str, ...] = tuple(ENTRIES)
    """Which to compare: meanflow, imf, imf-tokens, flow-matching, soflow, shortcut, ict, scm, imm, alpha-flow."""
    budget_flops: float | None = None
    """Operations of each training, matrix products alone (default: those of the preset of the data; digits' 6.2e12)."""
    steps: int | None = None
    """Training steps of each instead, whatever they cost."""
    seeds: tuple[int, ...] | None = None
    """Seeds of each training (default: 0 1 2 of digits, 0 of fashion)."""
    out: Path = Path("runs/compare")
    """Each comparison gets a folder in it. What is done is not repeated."""


def configs_of(options: Options) -> tuple[str, dict[str, RunConfig]]:
    """The name of a comparison, and the configuration of each of its entries.

    Raises:
        UserError: for entries that are not there, and budgets that train nothing.
    """
    asked = options.objectives
    unknown = next((name for name in asked if name not in ENTRIES), None)
    require(unknown is None, "objectives", unknown, "some of " + " ".join(ENTRIES), "see --help")
    require(len(asked) > 0, "objectives", asked, "at least one", "name some")
    require(options.seeds != (), "seeds", options.seeds, "at least one", "name some")
    both = options.steps is not None and options.budget_flops is not None
    require(not both, "steps", options.steps, "steps or budget_flops, not both", "leave one out")
    first = _preset(options)
    configs = {name: _preset(options, name) for name in asked}
    if options.steps is not None:
        name, steps = f"{options.data}-{options.steps}steps", dict.fromkeys(configs, options.steps)
    else:
        budget = options.budget_flops
        budget = first.train.steps * flops_of_step(first) if budget is None else budget
        name = f"{options.data}-{budget:.3g}flops".replace("+", "")
        steps = {entry: round(budget / flops_of_step(config)) for entry, config in configs.items()}
        least, wanted = min(steps.values()), "enough for a step of each objective"
        hint = f"one of {options.data} takes {flops_of_step(first):.1e}".replace("e+0", "e")
        require(least >= 1, "budget_flops", budget, wanted, hint)
    return name, {
        entry: replace(config, train=replace(config.train, steps=steps[entry], sample_every=steps[entry]))
        for entry, config in configs.items()
    }


def _preset(options: Options, name: str = "meanflow") -> RunConfig:
    config = preset(options.data + ENTRIES[name].preset)
    return replace(config, data=replace(config.data, path=options.path))


def compare(options: Options) -> tuple[int, Path]:
    """Train and judge every entry: table.md, table.json and picture.png in a folder of options.out.

    Returns:
        0, or the exit code of a training that a signal stopped; the folder.
    """
    name, configs = configs_of(options)
    folder, data = options.out / name, DATA[options.data]
    seeds = options.seeds or data.seeds
    runs = {(entry, seed): folder / f"{entry}-seed{seed}" for entry in configs for seed in seeds}
    with owned(folder):
        code = train_all({path: _seeded(configs[entry], seed) for (entry, seed), path in runs.items()})
        if code:
            return code, folder
        judge, entries = ClassifierJudge(_preset(options).data), {}
        images = {data.real: real_grid(judge)}
        with World("auto") as world:
            for entry, config in configs.items():
                about = ENTRIES[entry]
                paths = [runs[entry, seed] for seed in seeds]
                judged = judge_runs(judge, paths, config, world)
                entries[entry] = {"label": about.label, "published": about.published, "whose": about.whose}
                entries[entry] |= _accounts(config, paths) | {"samples": judged}
                fewest = min(STEPS_OF_SAMPLES)
                net, guidance = sampler_of(paths[0], world), judged[str(fewest)]["guidance"]
                images[about.label] = grid_of(net, seeds[0], world.device, even_times(fewest), guidance)
        result = {
            "data": options.data,
            "equal": "FLOPs" if options.steps is None else "steps",
            "seeds": list(seeds),
            "floor": judge.floor(),
            "class_means": judge.class_means(),
            "entries": entries,
            "environment": environment(),
        }
        write_atomically(folder / "table.md", "\n".join(table(result)) + "\n")
        draw(folder / "picture.png", result, images)
        write_atomically(folder / "table.json", json.dumps(result, indent=2) + "\n")
    return 0, folder


@cache
def flops_of_step(config: RunConfig) -> float:
    """Operations of a training step."""
    return step_flops(config.model, make_objective(config))


def _seeded(config: RunConfig, seed: int) -> RunConfig:
    return replace(config, train=replace(config.train, seed=seed))


def sampler_of(run: Path, world: World) -> nn.Module:
    """The averaged network of a run, as its objective samples."""
    net, config, *_ = load_ema(run, world.device)
    is_flow_matching = isinstance(config.objective, ObjectiveConfig) and config.objective.share_equal == 1
    return Euler(net) if is_flow_matching else net


def judge_runs(judge: ClassifierJudge, runs: list[Path], config: RunConfig, world: World) -> dict[str, dict]:
    """The scores of each run by the number of sampling steps, at the guidance that is best for the first run."""
    told = config.objective.guidance_input != "none"
    points = search.grid(OMEGAS, INTERVALS, config) if told else [()]
    results = {}
    for steps in STEPS_OF_SAMPLES:

        def rows(run: Path, points: list[tuple[float, ...]], steps=steps) -> list[dict]:
            net, times = sampler_of(run, world), even_times(steps)
            file = run / f"scores_{steps}_steps.jsonl"
            found = search.sweep(
                points, lambda told: judge.score_net(net, world.device, times, told).as_dict(), file, world
            )
            return [row for row in found if tuple(row["guidance"]) in points]

        tried = rows(runs[0], points)
        best = search.best(tried)["guidance"]
        scores = [row for run in runs for row in rows(run, [tuple(best)])]
        results[str(steps)] = {"guidance": best, "tried": tried if told else [], "scores": scores}
    return results


def _accounts(config: RunConfig, runs: list[Path]) -> dict:
    """What was trained, and what it took: counted, and measured by the runs' logs (the mean over the seeds)."""
    flops, forward = flops_of_step(config), sample_flops(config.model).forward
    costs = [cost_of(run)._asdict() for run in runs]
    return {
        "steps": config.train.steps,
        "flops": config.train.steps * flops,
        "forwards_per_step": flops / (config.train.batch * forward),
        "forward_flops": forward,
        "optimizer": in_words(config.optim),
        **{name: spread(costs, name)[0] for name in costs[0]},
    }


def in_words(optim: OptimConfig) -> str:
    """The optimizer's settings."""
    rate = f"lr {optim.lr:g} after {optim.warmup_steps} steps"
    betas = f"AdamW, beta {optim.beta1:g} and {optim.beta2:g}, weight decay {optim.weight_decay:g}"
    return f"{betas}, {rate}, average {optim.ema_decay:g}"


def table(result: dict) -> list[str]:
    """Format a comparison as two Markdown tables: mean ± standard deviation over the seeds."""
    entries, seeds = list(result["entries"].values()), len(result["seeds"])
    steps = list(entries[0]["samples"])
    each = ", ".join(steps)
    distances = [f"Fréchet distance in {n} step{'s' * (n != '1')}" for n in steps]
    lines = [
        (
            f"{result['data'].capitalize()} at equal {result['equal']}, {seeds} seed{'s' * (seeds > 1)}. The floor of "
            f"the Fréchet distance is {result['floor']:.2f}; the classes' mean images, which have no variance, score "
            f"{result['class_means']:.1f}."
        ),
        "",
        (
            f"| | {' | '.join(distances)} | accuracy in {each} | within-class variance, of the real, in {each} | "
            "told guidance |"
        ),
        "| --- " * (len(steps) + 4) + "|",
    ]
    for entry in entries:
        judged = entry["samples"].values()
        cells = [_distance(one["scores"]) for one in judged]
        cells += [", ".join(f"{spread(one['scores'], 'accuracy')[0]:.1%}" for one in judged)]
        cells += [", ".join(f"{spread(one['scores'], 'variance_ratio')[0]:.2f}" for one in judged)]
        cells += [", ".join(filter(None, (_guidance(one["guidance"]) for one in judged)))]
        lines.append(f"| {entry['label']} | {' | '.join(cells)} |")
    guided = [entry["label"] for entry in entries if any(judged["tried"] for judged in entry["samples"].values())]
    if guided:
        scales = ", ".join(f"{omega:g}" for omega in OMEGAS)
        lines += ["", f"Guidance told to {' and '.join(guided)}: best of {scales}, by the first seed's distance."]
    lines += [
        "",
        "| | training steps | TFLOP | F a step | MFLOP in F | images/s | CPU minutes | FID on ImageNet | whose |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        counted = f"{entry['flops'] / 1e12:.2f} | {entry['forwards_per_step']:.2f} | {entry['forward_flops'] / 1e6:.1f}"
        measured = f"{entry['images_per_second']:.0f} | {entry['cpu_seconds'] / 60:.1f}"
        fid = "" if entry["published"] is None else f"{entry['published']:.2f}"
        lines.append(f"| {entry['label']} | {entry['steps']} | {counted} | {measured} | {fid} | {entry['whose']} |")
    minutes = sum(entry["cpu_seconds"] for entry in entries) * seeds / 60
    optimizers: dict[str, list[str]] = {}
    for entry in entries:
        optimizers.setdefault(entry["optimizer"], []).append(entry["label"])
    told = [f"{', '.join(labels)}: {words}" for words, labels in optimizers.items()]
    return [
        *lines,
        "",
        (
            f"F: one forward of the batch to the network's output. CPU minutes: of one training; {minutes:.0f} for all "
            "of them. FID: of one-step samples, published. The optimizer is the project's, not that of each paper. "
            f"{'. '.join(told)}."
        ),
    ]


def _distance(scores: list[dict]) -> str:
    mean, deviation = spread(scores, "frechet")
    return f"{mean:.1f} ± {deviation:.1f}" if len(scores) > 1 else f"{mean:.1f}"


def _guidance(told: Sequence[float]) -> str:
    if not told:
        return ""
    omega, *interval = told
    return f"{omega:g} in [{interval[0]:g}, {interval[1]:g}]" if interval else f"{omega:g}"


def draw(path: Path, result: dict, images: dict[str, torch.Tensor]) -> None:
    """Draw distances, accuracy and variance, and the published figures, above one-step samples of the first seed."""
    from matplotlib.figure import Figure

    entries = list(result["entries"].values())
    columns = min(len(images), COLUMNS)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.5 * (1 + rows)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, rows))
    distance, quality, published = above.subplots(1, 3)
    below.suptitle(f"samples, sampling steps: {next(iter(entries[0]['samples']))}")
    places = below.subplots(rows, columns, squeeze=False).flatten()
    draw_grids(places[: len(images)], images)
    for empty in places[len(images) :]:
        empty.set_axis_off()
    colors = [f"C{i}" for i in range(len(entries))]

    for entry, color in zip(entries, colors, strict=True):
        steps = [int(each) for each in entry["samples"]]
        means, spreads = zip(
            *(spread(judged["scores"], "frechet") for judged in entry["samples"].values()), strict=True
        )
        distance.errorbar(steps, means, spreads, color=color, marker="o", capsize=4, label=entry["label"])
    distance.axhline(result["floor"], color="gray", linestyle=":", label="floor: real ones")
    distance.set_xscale("log", base=2)
    distance.set_yscale("log")
    distance.set_xticks(steps, steps)
    distance.set_xlabel("sampling steps")
    distance.set_title(f"Fréchet distance, {result['data']}, at equal {result['equal']}")
    distance.legend()

    place = range(len(entries))
    labels = [entry["label"].replace(" ", "\n") for entry in entries]
    for shift, key, words, alpha in ((-0.2, "accuracy", "accuracy", 1.0), (0.2, "variance_ratio", "variance", 0.5)):
        means, spreads = zip(
            *(spread(next(iter(entry["samples"].values()))["scores"], key) for entry in entries), strict=True
        )
        bars = quality.bar([i + shift for i in place], means, 0.38, yerr=spreads, color=colors, alpha=alpha, capsize=4)
        quality.bar_label(bars, [f"{words}\n{mean:.2f}" for mean in means], fontsize=6)
    quality.set_xticks(place, labels, fontsize=7)
    quality.margins(y=0.2)
    quality.set_title("one step: accuracy, and variance within a class, of the real")

    known = [i for i in place if entries[i]["published"] is not None]
    bars = published.bar(known, [entries[i]["published"] for i in known], color=[colors[i] for i in known])
    words = [f"{entries[i]['published']:.2f}\n{entries[i]['whose'].replace(', ', chr(10))}" for i in known]
    published.bar_label(bars, words, fontsize=6)
    published.set_yscale("log")
    published.set_ylim(1, 1e4)
    published.set_xticks(place, labels, fontsize=7)
    published.set_title("published: FID of one step, ImageNet 256x256")
    figure.savefig(path, dpi=110)


def main(args: list[str]) -> int:
    options = cli.parse(Options, args, prog="compare.py", description=__doc__)
    code, folder = compare(options)
    if code == 0:
        print((folder / "table.md").read_text())
        print(folder / "picture.png")
    return code


run = partial(cli.run, main)
