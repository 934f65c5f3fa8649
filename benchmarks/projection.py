"""Project the hours of the paper's recipes from measured steps: never a measurement.

python -m benchmarks.step --preset imagenet-xl2 --batch 32 --compare ours --rows rows.jsonl      (measures)
python -m benchmarks.projection rows.jsonl                                                       (projects)

ROWS are files of JSON lines or folders of them; of a recipe and variant the newest row of a card counts. A recipe takes
its steps of 256 images, on 256 / batch GPUs with the measured batch each. Data parallel GPUs sum fp32
gradients by a ring: 2 (n - 1) / n times the parameters' bytes through each GPU's link. The shorter time hides that
behind the backward, the longer one adds it; the real one lies between if nothing else (data, the slowest rank) is in
the way.
"""

import argparse
import json
from pathlib import Path

from meanflow.errors import UserError
from meanflow.model.build import build_net
from meanflow.presets import BATCH, preset

from .counting.accounts import META
from .harness.arguments import BadInput, finite
from .harness.rows import newest, read
from .harness.table import table

LINK_GBPS = 450.0
"""NVLink of an H100 or H200 SXM in each direction (NVIDIA's datasheets: 900 GB/s both ways)."""


def parameter_bytes(name: str) -> int:
    """Bytes of the parameters of a preset's network, in fp32."""
    with META:
        return sum(p.nbytes for p in build_net(preset(name).model).parameters())


def usable(rows: list[dict]) -> list[dict]:
    """The step rows that a recipe's time can be projected from: ours, on a GPU, with a batch that divides the recipe's.

    A variant that did not fit is a row without a time, and the same step of another preset is no row of this one.
    """
    found = [r for r in rows if r.get("preset") and r.get("gpu") and r.get("ms")]
    found = [r for r in found if r["variant"].startswith("ours") and BATCH % r["batch"] == 0]
    return newest(found, lambda r: (r["preset"], r["gpu"], r["batch"], r["variant"]))[0]


def project(row: dict, link_gbps: float) -> dict:
    """Hours of a whole recipe from a measured step of its model and objective."""
    gpus = BATCH // row["batch"]
    steps = preset(row["preset"]).train.steps
    exchange_ms = 2 * (gpus - 1) / gpus * parameter_bytes(row["preset"]) / link_gbps / 1e6
    hours = [steps * ms / 3.6e6 for ms in (row["ms"], row["ms"] + exchange_ms)]
    return {
        "kind": "projection",
        "preset": row["preset"],
        "gpu": row["gpu"],
        "variant": row["variant"],
        "gpus": gpus,
        "batch": row["batch"],
        "steps": steps,
        "measured_ms": row["ms"],
        "exchange_ms": exchange_ms,
        "link_gbps": link_gbps,
        "hours": hours[1],
        "hours_hidden": hours[0],
        "gpu_hours": gpus * hours[1],
        "note": "projected from a measured step on one GPU; gradient exchange added, none hidden",
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.projection", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("measured", nargs="+", type=Path, metavar="ROWS",
                        help="rows that benchmarks.step --preset wrote on a GPU")  # fmt: skip
    parser.add_argument("--link-gbps", type=finite, default=LINK_GBPS, help=f"GB/s of a GPU's link ({LINK_GBPS:g})")
    parser.add_argument("--rows", type=Path, default=None, help="append the projections to this file of JSON lines")
    options = parser.parse_args(args)
    try:
        steps = usable(read(options.measured).by_kind["step"])
        rows = [project(row, options.link_gbps) for row in steps]
    except UserError as error:
        raise BadInput(f"benchmarks.projection: error: {error}") from None
    if not rows:
        raise BadInput(
            f"ROWS: got {', '.join(map(str, options.measured))} without a step of a preset on a GPU, wanted one; "
            "run benchmarks.step --preset imagenet-xl2 --batch 32 --compare ours --rows FILE on a GPU"
        )
    if options.rows:
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    lines = [
        [r["preset"], f"{r['gpus']} x {r['gpu']}", f"{r['measured_ms']:.1f}", f"{r['exchange_ms']:.1f}",
         f"{r['hours_hidden']:.1f} to {r['hours']:.1f}", f"{r['gpu_hours']:.0f}"]
        for r in rows
    ]  # fmt: skip
    print("PROJECTED, not measured, from a measured step on one GPU")
    print(table(["recipe", "GPUs", "measured ms", "exchange ms", "hours", "GPU-hours"], lines))


if __name__ == "__main__":
    main()
