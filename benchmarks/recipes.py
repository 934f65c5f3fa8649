"""What the paper's recipes ask of the hardware: ``python -m benchmarks.recipes --gpus 8 --mfu 0.4``.

Work and memory are counted on the step's own code (benchmarks.accounting), in bf16. Hours are a PROJECTION: the counted
work over the datasheet's peak and a supposed MFU, the share of that peak that a step reaches. Measured steps give
better ones: benchmarks.projection.

    weights   fp32 weights, gradients, two moments, average, and the bf16 copies: 22 bytes a parameter
    saved     what a forward keeps for its backward, of a GPU's samples; --train.checkpoint-blocks and
              --train.accumulate keep less. Beside it a step needs room to work in, a tenth to a fifth more
"""

import argparse
import json
from dataclasses import replace

from meanflow.errors import UserError, require
from meanflow.peaks import PEAKS
from meanflow.presets import PRESETS, preset

from .accounting import account
from .table import table

RECIPES = [name for name in PRESETS if name.startswith("imagenet-")]
CARDS = {"A100": "NVIDIA A100-SXM4-80GB", "H100": "NVIDIA H100 80GB HBM3"}
STATE_BYTES = 4 + 4 + 8 + 4 + 2
BATCHES = 200


def ask(name: str, gpus: int, mfu: float) -> dict:
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


def text(rows: list[dict]) -> str:
    """As a table."""
    head = rows[0]
    hours = [f"hours, {head['gpus']} {card}" for card in CARDS]
    header = ["recipe", "parameters", "batch a GPU", "weights", "saved", "TFLOP a step", "steps", *hours, "FID (paper)"]
    lines = [
        [
            r["preset"],
            f"{r['parameters'] / 1e6:.0f} M",
            r["batch_per_gpu"],
            f"{r['weights_gb']:.1f} GB",
            f"{r['saved_gb']:.1f} GB",
            f"{r['step_tflop']:.0f} ({r['step_in_forwards']:.2f} F)",
            f"{r['steps']:,}",
            *(f"{value:.0f}" for value in r["hours_projected"].values()),
            "2.20 in 2 steps" if r["fid_paper"] is None else f"{r['fid_paper']:g}",
        ]
        for r in rows
    ]
    note = f"hours: PROJECTION at a supposed MFU of {head['mfu_supposed']:.0%}, not measured; work and bytes: counted"
    return f"{table(header, lines)}\n{note}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, help="that share the batch of 256 (default 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="supposed for the hours (default 0.4)")
    parser.add_argument("--presets", nargs="+", default=RECIPES, help="recipes (default: the six of Table 4)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    try:
        rows = [ask(name, options.gpus, options.mfu) for name in options.presets]
    except UserError as error:
        parser.error(str(error))
    print(json.dumps(rows, indent=2) if options.json else text(rows))


if __name__ == "__main__":
    main()
