"""Sweep one axis of the paper's ablations on digits: three seeds a row, table and picture beside the paper's numbers.

python scripts/ablate.py tangent          Table 1b
axes: share (1a) tangent (1b) embedding (1c) sampler (1d) weight (1e) omega (1f) kappa (Table 5) precision (ours)
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tyro.conf import Positional

from .. import cli
from ..config import RunConfig
from ..errors import require
from ..evaluation.classifier import ClassifierJudge, spread
from ..interop.weights import load_ema
from ..presets import ABLATIONS, preset
from ..storage.record import write_atomically
from ..training.trainer import train_all
from ..world import choose_device

SEEDS = (0, 1, 2)
STEPS = 600
# guidance needs an unconditional network
GUIDANCE_DROP = 0.1


@dataclass(frozen=True)
class Axis:
    """One sweep: its rows are overrides of the objective (or the embedding), with the paper's FID where it has one."""

    title: str
    rows: dict[str, tuple[dict, float | None]]


def _axes() -> dict[str, Axis]:
    names = {
        "share": ("table1a", "share of samples with r ≠ t, in % (Table 1a)"),
        "tangent": ("table1b", "direction of the derivative (Table 1b)"),
        "embedding": ("table1c", "embedded times (Table 1c)"),
        "sampler": ("table1d", "distribution of t and r (Table 1d)"),
        "weight": ("table1e", "adaptive weight: power p (Table 1e) and constant c"),
        "omega": ("table1f", "guidance scale (Table 1f)"),
        "kappa": ("table5", "guidance mixing at the effective scale 2 (Table 5)"),
    }
    axes = {name: Axis(title, dict(ABLATIONS[table])) for name, (table, title) in names.items()}
    # the paper keeps c; here its range is swept too
    axes["weight"].rows.update({f"c{c:g}": ({"norm_c": c}, None) for c in (1e-4, 1e-3, 1e-1, 1.0)})
    axes["precision"] = Axis(
        "dtype of matrix products and attention", {name: ({"precision": name}, None) for name in ("fp32", "bf16")}
    )
    return axes


AXES = _axes()


def run_config(overrides: dict, seed: int, steps: int) -> RunConfig:
    """The configuration of digits with a row's overrides."""
    config = preset("digits")
    train = {"steps": steps, "seed": seed, "save_every": steps, "sample_every": steps}
    sections = {"model": {}, "objective": {}, "train": train}
    for key, value in overrides.items():
        sections[{"time_embedding": "model", "precision": "train"}.get(key, "objective")][key] = value
    if "omega" in overrides:
        sections["objective"]["label_drop"] = GUIDANCE_DROP
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in sections.items()})


def sweep(name: str, out: Path, steps: int = STEPS, seeds: tuple[int, ...] = SEEDS) -> int:
    """Train and judge every row of an axis: table.md, table.json, picture.png in out/name. Done runs are not repeated.

    Returns:
        0, or the exit code of a training that a signal stopped.
    """
    require(name in AXES, "axis", name, "one of " + " ".join(AXES), "see --help")
    require(len(seeds) > 0, "seeds", seeds, "at least one", "name some")
    axis = AXES[name]
    runs = {
        (row, seed): (out / name / f"{row}-steps{steps}-seed{seed}", run_config(overrides, seed, steps))
        for row, (overrides, _) in axis.rows.items()
        for seed in seeds
    }
    code = train_all(dict(runs.values()))
    if code:
        return code
    judge, results = ClassifierJudge(preset("digits").data), {}
    for row, (_, fid) in axis.rows.items():
        scores = []
        for seed in seeds:
            folder, config = runs[row, seed]
            device = choose_device(config.train.device)
            scores.append(judge.score_net(load_ema(folder, device)[0], device).as_dict())
        results[row] = {"paper_fid": fid, "scores": scores}
    result = {
        "axis": name,
        "title": axis.title,
        "steps": steps,
        "seeds": list(seeds),
        "floor": judge.floor(),
        "rows": results,
    }
    (out / name).mkdir(parents=True, exist_ok=True)
    write_atomically(out / name / "table.json", json.dumps(result, indent=2) + "\n")
    write_atomically(out / name / "table.md", "\n".join(table(result)) + "\n")
    draw(out / name / "picture.png", result)
    return 0


def table(result: dict) -> list[str]:
    """Format an axis as a Markdown table: mean ± standard deviation over the seeds."""
    lines = [
        (
            f"Digits, {result['title']}: {result['steps']} steps, {len(result['seeds'])} seeds, one-step samples; "
            f"the floor of the Fréchet distance is {result['floor']:.2f}."
        ),
        "",
        "| | Fréchet distance | accuracy | within-class variance | paper's FID (ImageNet, B/4) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row, values in result["rows"].items():
        (frechet, d_frechet), (accuracy, _), (variance, _) = (
            spread(values["scores"], key) for key in ("frechet", "accuracy", "variance_ratio")
        )
        fid = "" if values["paper_fid"] is None else f"{values['paper_fid']:.2f}"
        lines.append(f"| {row} | {frechet:.1f} ± {d_frechet:.1f} | {accuracy:.1%} | {variance:.2f} | {fid} |")
    return lines


def draw(path: Path, result: dict) -> None:
    """Draw our scores and the paper's as bars side by side, each on its own scale."""
    from matplotlib.figure import Figure

    rows = list(result["rows"])
    figure = Figure(figsize=(1.5 + 1.1 * len(rows), 3.8), layout="constrained")
    ours = figure.subplots()
    place = torch.arange(len(rows)).double().numpy()
    means, spreads = zip(*(spread(result["rows"][row]["scores"], "frechet") for row in rows), strict=True)
    ours.bar(place - 0.2, means, 0.38, yerr=spreads, color="tab:blue", label="digits, ours", capsize=3)
    ours.axhline(result["floor"], color="tab:blue", linestyle=":", linewidth=1)
    ours.set_ylabel("Fréchet distance, digits (dotted: floor)", color="tab:blue")
    ours.set_xticks(place, rows)
    ours.set_xlabel(result["title"])
    fids = [result["rows"][row]["paper_fid"] for row in rows]
    scales = [(ours, means)]
    if any(fids):
        paper = ours.twinx()
        paper.bar(place + 0.2, [fid or 0 for fid in fids], 0.38, color="tab:orange", label="ImageNet, paper")
        paper.set_ylabel("FID, ImageNet 256x256, B/4 (paper)", color="tab:orange")
        scales.append((paper, [fid for fid in fids if fid]))
    for axes, values in scales:
        if max(values) > 20 * min(values):
            axes.set_yscale("log")
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Options:
    axis: Positional[str]
    """share, tangent, embedding, sampler, weight, omega, kappa or precision."""
    steps: int = STEPS
    """Training steps a run."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds of each row."""
    out: Path = Path("runs/ablations")
    """Each axis gets a folder in it. Runs that are done are not repeated."""


def main(args: list[str]) -> int:
    options = cli.parse(Options, args, prog="ablate.py", description=__doc__)
    code = sweep(options.axis, options.out, options.steps, options.seeds)
    if code == 0:
        folder = options.out / options.axis
        print((folder / "table.md").read_text())
        print(folder / "picture.png")
    return code


run = partial(cli.run, main)
