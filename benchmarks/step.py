"""Time the training step by variant, on synthetic latents of the real shape.

python -m benchmarks.step --model XL/2 --batch 32 --compare naive,naive-compiled,ours
python -m benchmarks.step --device cpu --model S/4 --batch 32 --precision fp32 --kappa 0.5

All variants make the same steps: same weights, draws, dtype and recipe, guidance, backward, optimizer and moving
average included; what the host does before (reading data, drawing times, planning) is not. No variant is timed before
its gradient has been compared with the first's, or with that of --against (`workloads.step_timer` says how they take
turns). A variant that does not fit in memory, or would be another's step, is a row with its reason. Exit code 1: a
gradient is another, or a variant failed.
"""

import argparse
import sys

from meanflow.errors import UserError

from .harness.arguments import BadInput
from .harness.rows import append
from .harness.table import table
from .workloads.step_timer import measure
from .workloads.step_variants import VARIANTS
from .workloads.step_workload import add_workload_arguments, identity, make_workload, title

REPEATS = {"cuda": 30, "cpu": 10}


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
