"""MeanFlow beside flow matching on digits: the same budget, the same network, one step each."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..config import RunConfig
from ..config_json import to_dict
from ..errors import UserError, require
from ..evaluation.classifier import ClassifierJudge, draw_grids, grid_of, real_grid
from ..interop.weights import load_ema
from ..owner import owned
from ..storage.record import environment, write_atomically
from ..training.runlog import cost_of, foreign_entry
from ..training.trainer import train_all
from ..world import choose_device

TITLES = {
    "real": "real digits",
    "meanflow": "MeanFlow, one step",
    "flow_matching": "flow matching, one step",
}


@contextmanager
def folder_of(out: Path, config: RunConfig) -> Iterator[Path]:
    """Own the folder of a configuration: out, or one beside it if out holds another. What is refused leaves nothing."""
    text = json.dumps(to_dict(config), indent=2) + "\n"
    recorded = out / "config.json"
    if recorded.exists() and recorded.read_text() != text:
        out = out.with_name(f"{out.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
        recorded = out / "config.json"
    begins = not recorded.exists()
    if begins:
        foreign = foreign_entry(out)
        wanted = f"an empty folder or a quickstart's: this one holds {foreign}"
        require(foreign is None, "out", str(out), wanted, "name another by --out")
    with owned(out):
        write_atomically(recorded, text)
        try:
            yield out
        except UserError:
            if begins and [p for p in out.iterdir() if not p.name.startswith(".")] == [recorded]:
                recorded.unlink()
            raise


def compare(configs: dict[str, RunConfig], out: Path) -> int:
    """Train each configuration, judge its one-step samples, write samples.png, report.json and report.md into out.

    Returns:
        0, or the exit code of a training that a signal stopped.
    """
    for name, config in configs.items():
        require(
            config.data.name == "digits", "data.name", config.data.name, "digits", "for latents see scripts/train.py"
        )
    code = train_all({out / name: config for name, config in configs.items()})
    if code:
        return code
    judge = ClassifierJudge(configs["meanflow"].data)
    images = {TITLES["real"]: real_grid(judge)}
    scores, costs = {}, {}
    for name, config in configs.items():
        device = choose_device(config.train.device)
        net, *_ = load_ema(out / name, device)
        scores[name] = judge.score_net(net, device)
        images[TITLES[name]] = grid_of(net, config.train.seed, device)
        costs[name] = cost_of(out / name)
    report = {
        **scores["meanflow"].as_dict(),
        "frechet_floor": judge.floor(),
        "frechet_flow_matching": scores["flow_matching"].frechet,
        "frechet_class_means": judge.class_means(),
        "accuracy_flow_matching": scores["flow_matching"].accuracy,
        "variance_ratio_flow_matching": scores["flow_matching"].variance_ratio,
        "classifier_accuracy_real": judge.accuracy_real,
        "steps": configs["meanflow"].train.steps,
        "train_seconds": sum(cost.seconds for cost in costs.values()),
        "images_per_second": costs["meanflow"].images_per_second,
        "images_per_second_flow_matching": costs["flow_matching"].images_per_second,
        "environment": environment(),
    }
    draw_samples(out / "samples.png", images)
    write_atomically(out / "report.md", "\n".join(report_lines(report)) + "\n")
    write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")  # last: it marks the end
    return 0


def report_lines(report: dict) -> list[str]:
    """Format the report as Markdown."""
    r = report
    rows = [
        ("", "MeanFlow", "flow matching", "real digits"),
        ("---",) * 4,
        (
            "Fréchet distance",
            f"{r['frechet']:.2f}",
            f"{r['frechet_flow_matching']:.2f}",
            f"{r['frechet_floor']:.2f} (floor)",
        ),
        (
            "within-class variance, of the real",
            f"{r['variance_ratio']:.2f}",
            f"{r['variance_ratio_flow_matching']:.2f}",
            "1",
        ),
        (
            "put into the right class",
            f"{r['accuracy']:.1%}",
            f"{r['accuracy_flow_matching']:.1%}",
            f"{r['classifier_accuracy_real']:.1%} (held out)",
        ),
        ("trained at, images/s", f"{r['images_per_second']:.0f}", f"{r['images_per_second_flow_matching']:.0f}", ""),
    ]
    seconds = f"{r['train_seconds']:.0f} s for both"
    return [
        "# One-step generation of handwritten digits",
        "",
        f"Two networks, {r['steps']} training steps each ({seconds}), one evaluation an image.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "Fréchet distance: in the features of a small classifier; the floor is that of as many real digits drawn with",
        f"replacement, the classes' mean images score {r['frechet_class_means']:.1f}. Flow matching in one step gives",
        "class means: always the right class, never any variety.",
    ]


def draw_samples(path: Path, images: dict[str, Tensor]) -> None:
    """Draw grids of uint8 digits side by side, by their titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(images), 4.4), layout="constrained")
    draw_grids(figure.subplots(1, len(images)), images)
    figure.savefig(path, dpi=150)
