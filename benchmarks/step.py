"""Time the training step by variant, on synthetic latents of the real shape.

python -m benchmarks.step --model XL/2 --batch 32 --compare naive,naive-compiled,ours
python -m benchmarks.step --device cpu --model S/4 --batch 32 --precision fp32 --kappa 0.5

All variants make the same steps: same weights, draws, dtype and recipe, guidance, backward, optimizer and moving
average included; what the host does before (reading data, drawing times, planning) is not. No variant is timed before
its gradient has been compared with the first's, or with that of --against (`measuring` says how they take turns). A variant that does not fit in
memory, or would be another's step, is a row with its reason. Exit code 1: a gradient is another, or a variant failed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.errors import UserError
from meanflow.presets import preset

from . import arbiter
from .arguments import BadInput, available, finite, positive
from .environment import environment, merge
from .measuring import measure
from .table import table
from .variants import VARIANTS, Workload

REPEATS = {"cuda": 30, "cpu": 10}


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, where, and where the rows go."""
    parser.add_argument("--preset", default=None, help="a recipe's model and objective, instead of those below")
    parser.add_argument("--model", default="XL/2", help="size and patch, for instance B/4 (default XL/2)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument(
        "--input-size", type=int, default=32, help="side of the latents; 64 is ImageNet-512 (default 32)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products and attention")
    parser.add_argument("--omega", type=finite, default=1.0, help="guidance: weight of the sample's velocity")
    parser.add_argument(
        "--kappa", type=finite, default=0.5, help="guidance: weight of u(z,t,t|y); 0 and omega 1 is none"
    )
    parser.add_argument("--interval", type=finite, nargs=2, default=(0.0, 1.0), help="t that is guided (default 0 1)")
    parser.add_argument("--share", type=finite, default=0.25, help="share of r != t (default 0.25)")
    parser.add_argument("--device", type=available, default="cuda", help="cuda (default), or cpu")
    parser.add_argument("--repeats", type=positive, default=None, help="timed steps")
    parser.add_argument("--seconds", type=finite, default=math.inf, help="CPU: fewer steps where they take longer")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    arbiter.add_argument(parser)


def make_workload(options: argparse.Namespace) -> Workload:
    """What the arguments ask for.

    Raises:
        UserError: for a value out of range.
    """
    arbiter.join(options.turns)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    if options.preset:
        recipe = preset(options.preset)
        model, objective = recipe.model, recipe.objective
    else:
        model = ModelConfig.official(options.model, input_size=options.input_size)
        objective = ObjectiveConfig(
            omega=options.omega, kappa=options.kappa, share_equal=1 - options.share,
            guidance_start=options.interval[0], guidance_end=options.interval[1],
        )  # fmt: skip
    return Workload.of(model, objective, options.batch, options.device, options.precision)


def identity(work: Workload, preset: str | None = None) -> dict:
    """The columns of a row that say what was trained."""
    model, objective = work.run.model, work.run.objective
    return {
        "preset": preset,
        "model": model.name,
        "batch": work.run.train.batch,
        "tokens": model.tokens,
        "precision": work.run.train.precision,
        "omega": objective.omega,
        "kappa": objective.kappa,
        "interval": (objective.guidance_start, objective.guidance_end),
        "share": 1 - objective.share_equal,
    }


def append(rows: list[dict], options: argparse.Namespace, path: Path | None = None) -> list[dict]:
    """The rows with where and when; they are written too, to ``path`` or to the file that --rows names."""
    # one date for all of them
    where, path = environment(options.device, options.commit), path or options.rows
    rows = [merge(row, where) for row in rows]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--compare", default="naive,naive-compiled,ours", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--against", choices=VARIANTS, metavar="VARIANT",
                        help="whose gradient all are compared with; it is not timed (default the first's)")  # fmt: skip
    add_workload_arguments(parser)
    options = parser.parse_args(args)
    names = options.compare.split(",")
    if unknown := set(names) - VARIANTS.keys():
        raise BadInput(f"--compare: got {sorted(unknown)}, wanted some of {','.join(VARIANTS)}; see --help")
    try:
        work = make_workload(options)
    except UserError as error:
        raise BadInput(f"benchmarks.step: error: {error}") from None
    rows = []
    for row in measure(work, names, options.repeats or REPEATS[options.device], options.seconds, options.against):
        # what is known stays, whatever happens to the next
        rows += append([identity(work, options.preset) | {"compared": names} | row], options)
    print(report(rows))
    return 1 if any(row.get("failed") for row in rows) else 0


def title(row: dict) -> str:
    """What was trained, and where."""
    where = row["gpu"] or f"CPU ({row['cpu']}, {row['threads']} threads)"
    guided = f"omega {row['omega']:g}, kappa {row['kappa']:g}, t in {list(row['interval'])}"
    shape = f"{row['model']}, batch {row['batch']}, {row['tokens']} tokens, {row['precision']}"
    return f"{shape}, {guided}, r != t {row['share']:.0%}, {where}"


def report(rows: list[dict]) -> str:
    """The variants as a table, and why some have no time."""
    found = [row for row in rows if row["ms"]]
    text = [title(rows[0])]
    if found:
        head = found[0]
        if head["mfu"]:
            needed = f"{head['needed_flops'] / 1e12:.1f} TFLOP that the recipe needs"
            text.append(f"MFU: {needed}, over time and datasheet peak")
        text.append(_table(found))
    return "\n".join(text + [f"{r['variant']}: not timed: {r['missing']['ms']}" for r in rows if not r["ms"]])


def _table(rows: list[dict]) -> str:
    bases = sorted({base for r in rows for base in r["times"]})
    header = ["step", "ms", "20 to 80 %", "img/s", *(f"x {base}" for base in bases), "peak GiB", "first step s"]
    header += ["MFU"] if rows[0]["mfu"] else []
    lines = []
    for r in rows:
        memory = f"{r['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in r else "-"
        times = (r["times"].get(base) for base in bases)
        mfu = [f"{r['mfu']:.1%}"] if r["mfu"] else []
        lines.append([r["variant"], f"{r['ms']:.1f}", f"{r['ms_20']:.1f} to {r['ms_80']:.1f}",
                      f"{r['images_per_second']:.1f}",
                      *(f"{x['50']:.2f} ({x['20']:.2f} to {x['80']:.2f})" if x else "-" for x in times),
                      memory, f"{r['first_step_seconds']:.0f}", *mfu])  # fmt: skip
    return table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
