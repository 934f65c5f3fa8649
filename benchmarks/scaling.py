"""Time and memory of the step over the batch, the tokens or the model.

python -m benchmarks.scaling --axis batch --model XL/2
python -m benchmarks.scaling --axis tokens --values 256,1024 --model B/2

A value that does not fit in memory gets a row that says so, and ends the axis. Exit code 1: the step failed otherwise.
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

VALUES = {
    "batch": ("8", "16", "32", "64", "128"),
    "tokens": ("256", "1024", "4096"),
    "model": ("S/2", "B/2", "M/2", "L/2", "XL/2"),
}
REPEATS = {"cuda": 20, "cpu": 5}


def set_value(options: argparse.Namespace, axis: str, value: str) -> None:
    """Put a value of the axis into the options.

    Raises:
        UserError: for what is no such value.
    """
    try:
        if axis == "model":
            options.model = value
        elif axis == "batch":
            options.batch = int(value)
        else:
            grid = round(int(value) ** 0.5)
            if grid**2 != int(value):
                raise ValueError
            options.input_size = grid * int(options.model.rpartition("/")[2])
    except ValueError:
        wanted = "a square number of tokens" if axis == "tokens" else "a whole number"
        raise UserError(f"--values: got {value!r}, wanted {wanted}; for instance {','.join(VALUES[axis])}") from None


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--axis", choices=VALUES, default="batch", help="what grows (default batch)")
    parser.add_argument("--values", default=None, help="of the axis, smallest first, separated by commas")
    parser.add_argument("--variant", default="ours", choices=VARIANTS, help="of the step (default ours)")
    add_workload_arguments(parser)
    options = parser.parse_args(args)
    rows = []
    for value in options.values.split(",") if options.values else VALUES[options.axis]:
        try:
            set_value(options, options.axis, value)
            work = make_workload(options)
        except UserError as error:
            raise BadInput(f"benchmarks.scaling: error: {error}") from None
        repeats = options.repeats or REPEATS[options.device]
        (row,) = measure(work, [options.variant], repeats, options.seconds)
        columns = identity(work, options.preset) | {"axis": options.axis}
        rows += append([columns | row | {"kind": "scaling"}], options)
        if not row["ms"]:
            break
    lines = []
    for row in rows:
        memory = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "-"
        why = (row.get("missing") or {}).get("ms")
        ms, rate = (f"{row['ms']:.1f}", f"{row['images_per_second']:.1f}") if row["ms"] else (why, "-")
        lines.append([row["model"], row["batch"], row["tokens"], ms, rate, memory])
    print(f"{options.variant}, over {options.axis}; the last: {title(rows[-1])}")
    print(table(["model", "batch", "tokens", "ms", "img/s", "peak GiB"], lines))
    return 1 if rows[-1].get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
