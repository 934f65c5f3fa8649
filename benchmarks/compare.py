"""Compare two folders of rows, measurement by measurement: ``python -m benchmarks.compare BASE NEW``.

BASE and NEW are files of JSON lines or folders of them, as for benchmarks.report. Rows are the same measurement where
kind, step or operator, shape, dtype, variant and card are the same; of several in a folder the newest counts. The
ratio is the new time over the base's: of steps of the same inputs the median over the pairs with its 20 to 80 %
quantiles, else of the medians, with the bounds that the quantiles of both leave. What only one side has is named, and
so is what cannot be compared: another card, or another flush of the L2 cache before the timed call.

Exit code: 0 nothing is slower, 1 something is slower beyond its spread and --tolerance, or has lost its time, 2 a
wrong argument.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from meanflow.errors import UserError

from .harness.arguments import finite
from .harness.clock import quantiles
from .harness.rows import by_machine, device_name, hardware, newest, read, why_untimed
from .harness.table import table
from .pages.ratios import FEWEST, MARK, STEP, uncompared, uncompared_note

IDENTITY = {
    "kernel": ("op", "shape", "dtype", "variant", "bench"),
    "step": (*STEP, "variant"),
    "scaling": ("axis", *STEP, "variant"),
    "optimizer": ("model", "implementation"),
    "inference": ("part", "variant", "model", "batch", "input_size", "precision", "steps"),
}
"""The kinds of rows that have times to compare, and the columns by which two are of the same measurement."""


def name_of(row: dict) -> tuple:
    """The identity of a measurement, the card left out."""
    # JSON has no tuples: an interval is a list
    return row["kind"], *(str(row.get(column)) for column in IDENTITY[row["kind"]])


def words_of(row: dict) -> str:
    """A measurement's name for people."""
    columns = {column: row.get(column) for column in IDENTITY[row["kind"]]}
    if row["kind"] in ("step", "scaling"):
        columns["omega"] = None if columns["omega"] is None else f"omega {columns['omega']:g}"
        columns["kappa"] = None if columns["kappa"] is None else f"kappa {columns['kappa']:g}"
        columns["share"] = None if columns["share"] is None else f"r != t {columns['share']:.0%}"
        columns["batch"] = f"batch {columns['batch']}"
        del columns["tokens"]
    return " ".join([row["kind"], *(str(value) for value in columns.values() if value is not None)])


def timed(rows: Iterable[dict]) -> list[dict]:
    """The newest row of each measurement on each card, with or without a time."""
    return newest([row for row in rows if row["kind"] in IDENTITY], lambda row: (name_of(row), device_name(row)))[0]


def ratio(new: dict, base: dict) -> tuple[float, float, float]:
    """The new time over the base's: low, median, high."""
    pairs = list(zip(new.get("step_ms") or (), base.get("step_ms") or (), strict=False))
    if len(pairs) >= FEWEST:
        return quantiles([a / b for a, b in pairs])
    # nobody knows which call of one belongs to which of the other
    return new["ms_20"] / base["ms_80"], new["ms"] / base["ms"], new["ms_80"] / base["ms_20"]


def verdict(found: tuple[float, float, float], tolerance: float) -> str:
    low, _, high = found
    return "SLOWER" if low > 1 + tolerance else "faster" if high < 1 / (1 + tolerance) else "same"


def compare(base: list[dict], new: list[dict], tolerance: float) -> tuple[list[list[str]], list[str], bool]:
    """The lines of the table, what was not compared and why, and whether anything is worse."""
    old = {(name_of(row), device_name(row)): row for row in timed(base)}
    cards = dict(old.keys())
    lines, left, worse, met = [], [], False, set()
    for row in timed(new):
        key = (name_of(row), device_name(row))
        other = old.get(key)
        met.add(key)
        if other is None:
            elsewhere = cards.get(key[0])
            if elsewhere:
                met.add((key[0], elsewhere))
            left.append(f"{'other card, ' + elsewhere + ' and ' + key[1] if elsewhere else 'new'}: {words_of(row)}")
        elif not other.get("ms"):
            left.append(f"no time in BASE ({why_untimed(other)}): {words_of(row)}")
        elif not row.get("ms"):
            worse = True
            left.append(f"LOST its time ({why_untimed(row)}): {words_of(row)}")
        elif other.get("flush") != row.get("flush"):
            flushes = " and ".join(r.get("flush") or "not recorded" for r in (other, row))
            left.append(f"other flush, {flushes}: {words_of(row)}")
        else:
            found = ratio(row, other)
            said = verdict(found, tolerance)
            worse |= said == "SLOWER"
            unsure = any(r["kind"] == "step" and uncompared(r, side) for r, side in ((row, new), (other, base)))
            words = f"{found[1]:.3f} ({found[0]:.3f} to {found[2]:.3f})" + f" {MARK}" * unsure
            lines.append([words_of(row), f"{other['ms']:.4g}", f"{row['ms']:.4g}", words, said])
    left += [f"gone: {words_of(row)}" for key, row in old.items() if key not in met]
    return lines, left, worse


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("base", type=Path, metavar="BASE", help="file of JSON lines, or a folder of them")
    parser.add_argument("new", type=Path, metavar="NEW", help="the same, measured later")
    parser.add_argument("--tolerance", type=finite, default=0.03, help="how much slower is slower (default 0.03)")
    options = parser.parse_args(args)
    try:
        base, new = (read([path]).shown for path in (options.base, options.new))
    except UserError as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 2
    lines, left, worse = compare(base, new, options.tolerance)
    for side, rows in (("BASE", base), ("NEW", new)):
        groups = by_machine([row for row in rows if row["kind"] in IDENTITY])
        print("\n".join(f"{side}: {hardware(group)}" for group in groups))
    if lines:
        print(table(["measurement", "base ms", "new ms", "new over base (20 to 80 %)", ""], lines))
    steps = [row for rows in (base, new) for row in timed(rows) if row["kind"] == "step"]
    print("\n".join([*left, *uncompared_note(steps, [*base, *new])]))
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
