"""Demands of the papers' recipes on the hardware: ``python -m benchmarks.recipes --gpus 8 --mfu 0.4``.

Work and memory are counted on the step's own code (benchmarks.accounting), in bf16. Hours are a PROJECTION. Those by
card are the counted work over the datasheet's peak and a supposed MFU, the share of that peak that a step reaches.
Where --rows has a measured step of a recipe, hours from the fastest of ours are beside them (benchmarks.projection).

    weights   fp32 weights, gradients, two moments, average, and the bf16 copies: 22 bytes a parameter
    saved     what a forward keeps for its backward, of a GPU's samples; --train.checkpoint-blocks and
              --train.accumulate keep less. Beside it a step needs room to work in, a tenth to a fifth more
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from meanflow.errors import UserError, require
from meanflow.presets import PRESETS, preset
from meanflow.training.peaks import PEAKS

from .counting.accounts import account
from .harness.arguments import finite
from .harness.rows import read
from .harness.table import markdown_table, table
from .projection import LINKS, project, usable

RECIPES = [name for name in PRESETS if name.startswith(("imagenet-", "imf-"))]
CARDS = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}
RESULTS = Path(__file__).parent / "results"
STATE_BYTES = 4 + 4 + 8 + 4 + 2
BATCHES = 200


def demands(name: str, gpus: int, mfu: float) -> dict:
    """A recipe's demands, as plain values.

    Raises:
        UserError: for GPUs that do not divide the batch, or an MFU that is no share.
    """
    require(0 < mfu <= 1, "mfu", mfu, "a share in (0, 1]", "0.4 is usual for transformers")
    config = preset(name)
    batch = config.train.batch
    require(batch % gpus == 0, "gpus", gpus, f"a divisor of the batch {batch}", "take a power of two")
    counted = account(
        replace(config, train=replace(config.train, batch=batch // gpus, precision="bf16")), batches=BATCHES
    )
    flops = counted["step_flops"] * gpus
    hours = {
        card: flops * config.train.steps / (gpus * PEAKS[full].tflops * 1e12 * mfu) / 3600
        for card, full in CARDS.items()
    }
    return {
        "kind": "recipe",
        "preset": name,
        "model": config.model.name,
        "gpus": gpus,
        "batch_per_gpu": batch // gpus,
        "parameters": counted["parameters"],
        "step_in_forwards": counted["step_in_forwards"],
        "step_tflop": flops / 1e12,
        "steps": config.train.steps,
        "weights_gb": counted["parameters"] * STATE_BYTES / 1e9,
        "saved_gb": counted["saved_bytes"] / 1e9,
        "mfu_supposed": mfu,
        "hours_projected": hours,
        "fid_paper": PRESETS[name].fid,
    }


def measured(steps: list[dict]) -> dict[str, dict]:
    """The projection of each recipe from its shortest measured step, per image."""
    found = sorted(usable(steps), key=lambda row: row["ms"] / row["batch"], reverse=True)
    return {row["preset"]: project(row, LINKS.nvlink) for row in found}


def lines_of(rows: list[dict], projected: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table."""
    head = rows[0]
    header = [
        "recipe",
        "parameters",
        "samples a GPU",
        "weights, optimizer, average",
        "kept for backward",
        "work of a step",
        "steps",
    ]
    header += [f"hours on {head['gpus']} {card} *" for card in CARDS] + ["hours, from a measured step", "FID (paper)"]
    lines = [
        [
            r["preset"],
            f"{r['parameters'] / 1e6:.0f} M",
            f"{r['batch_per_gpu']}",
            f"{r['weights_gb']:.1f} GB",
            f"{r['saved_gb']:.1f} GB",
            f"{r['step_tflop']:.0f} TFLOP ({r['step_in_forwards']:.2f} F)",
            f"{r['steps']:,}",
            *(hours_words(value) for value in r["hours_projected"].values()),
            measured_words(projected.get(r["preset"])),
            "2.20 in 2 steps" if r["fid_paper"] is None else f"{r['fid_paper']:g}",
        ]
        for r in rows
    ]
    return header, lines


def hours_words(hours: float) -> str:
    if hours < 0.1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"


def measured_words(row: dict | None) -> str:
    """Hours from a measured step, and which."""
    if row is None:
        return "-"
    low, high = (f"{row[name]:.1f}" for name in ("hours_hidden", "hours"))
    card = row["gpu"].removeprefix("NVIDIA ")
    # one GPU exchanges nothing
    hours = low if row["gpus"] == 1 else f"{low} to {high}"
    return f"{hours} on {row['gpus']} {card} ({row['variant']}, {row['measured_ms']:.1f} ms for {row['batch']})"


def notes(rows: list[dict]) -> str:
    head = rows[0]
    return (
        f"Hours are PROJECTIONS, no such run was made. * counted work at a supposed MFU of {head['mfu_supposed']:.0%}. "
        "From a measured step on one GPU: with the gradients' exchange hidden, "
        "and with all of it added. Work and bytes are counted."
    )


def text(rows: list[dict], projected: dict[str, dict]) -> str:
    """The recipes as a table, with notes."""
    return f"{table(*lines_of(rows, projected))}\n{notes(rows)}"


def markdown(rows: list[dict], projected: dict[str, dict]) -> str:
    """The same in Markdown."""
    header, lines = lines_of(rows, projected)
    return f"{markdown_table(header, [[f'`{name}`', *cells] for name, *cells in lines])}\n\n{notes(rows)}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, help="that share a recipe's batch (default 8)")
    parser.add_argument("--mfu", type=finite, default=0.4, help="supposed for the hours (default 0.4)")
    parser.add_argument("--presets", nargs="+", default=RECIPES, help="recipes (default: both papers')")
    parser.add_argument("--rows", nargs="+", type=Path, default=[RESULTS], metavar="ROWS",
                        help="measured steps: files or folders of rows (default: those committed)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    try:
        projected = measured(read(options.rows).by_kind["step"])
        rows = [demands(name, options.gpus, options.mfu) for name in options.presets]
    except UserError as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps([row | {"from_measured": projected.get(row["preset"])} for row in rows], indent=2))
    else:
        print(text(rows, projected))


if __name__ == "__main__":
    main()
