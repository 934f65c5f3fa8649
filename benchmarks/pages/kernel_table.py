"""Every kernel of a training step: how long, how often, of what kind, and what those of our operators are worth.

``python -m benchmarks.breakdown --kernels FILE`` writes a row a kernel, and the report shows the longest. ``ms`` and
``launches`` are of a step, the mean of those profiled; ``activity`` tells kernels from memsets and copies. All rows
together are what the GPU did; of ``wall_ms``, the step's time under the profiler, it idled the rest. On a CPU rows are
of operators, and of the Python between them by the range that it ran in.

A kernel that serves one of our operators says what that operator is worth (`counting.step_kernels`).
"""

import html
import re
from collections import Counter

from ..counting.step_kernels import TRANSFERS
from ..harness.rows import by_machine, hardware, missing, rate
from ..harness.table import table
from .markup import NONE, Page, by_workload, grid, notes, number, older, percent, where
from .sections import ceiling_words

TOP = 30
BAR = 6
"""Characters of the longest kernel's bar."""


SHARES = (
    "Rate and share: the operator's, that is the FLOPs (with matrix products) or else the fewest bytes of all its "
    "calls in a step, over the time of all kernels that serve it."
)


def short(name: str, width: int) -> str:
    """A kernel's name without what all share, and no longer than ``width``."""
    name = re.sub(r"^void |\(anonymous namespace\)::|at::native::|pytorch_flash::|meanflow::", "", name)
    return name if len(name) <= width else name[: width - 1] + "…"


def summary(rows: list[dict]) -> str:
    """A line: the step's time by activity."""
    ms, launches = Counter(), Counter()
    for row in rows:
        ms[row["activity"]] += row["ms"]
        launches[row["activity"]] += row["launches"]
    words = [f"{what} {number(ms[what])} ms ({launches[what]:,.0f} times)" for what in ms]
    wall = rows[0]["wall_ms"]
    idle = max(0.0, wall - sum(ms.values()))
    return f"A step under the profiler {number(wall)} ms: {', '.join(words)}, idle {number(idle)} ms."


def ceilings_of(rows: list[dict]) -> list[str]:
    """The ceilings that the rows' shares are of."""
    found = {row["bound"]: row["ceiling"] for row in rows if row.get("bound")}
    return [f"Measured: {ceiling_words(found.get('copy'), found.get('gemm'))}. {SHARES}"] if found else []


def bar(length: float) -> str:
    """A bar of block characters, ``length`` of them to an eighth."""
    eighths = max(1, round(8 * length))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def lines(rows: list[dict], width: int) -> tuple[list[str], list[list[str]]]:
    """Header ("=" marks words) and lines of the longest kernels, memsets and copies left out."""
    total = sum(row["ms"] for row in rows)
    kernels = sorted((row for row in rows if row["activity"] not in TRANSFERS), key=lambda row: -row["ms"])
    top, others = kernels[:TOP], kernels[TOP:]
    found = [
        [short(row["kernel"], width), row["kernel_kind"], number(row["ms"], 3), percent(row["ms"] / total)]
        + [bar(BAR * row["ms"] / top[0]["ms"]), number(row["launches"], 3), number(row["us"], 3)]
        + [row.get("operator") or NONE, reached(row), percent(row.get("share_of_ceiling"))]
        for row in top
    ]
    if others:
        ms = sum(row["ms"] for row in others)
        launches = sum(row["launches"] for row in others)
        found.append([f"{len(others)} others", NONE, number(ms, 3), percent(ms / total), "", number(launches, 3)])
        found[-1] += [number(1e3 * ms / launches, 3), NONE, NONE, NONE]
    header = ["=kernel", "=kind", "ms a step", "share", "=", "launches", "us each"]
    return header + ["=operator", "rate", "of the ceiling"], found


def reached(row: dict) -> str:
    """The rate of the operator that a kernel serves."""
    if not row.get("operator_ms"):
        return NONE
    value, unit = rate(row | {"ms": row["operator_ms"]})
    return f"{number(value)} {unit}"


def text(rows: list[dict]) -> str:
    """The longest kernels as a printed table."""
    header, found = lines(rows, 60)
    return "\n".join([summary(rows), *ceilings_of(rows), table([title.removeprefix("=") for title in header], found)])


def section(page: Page, rows: list[dict]) -> str:
    """The report's tables, of the last run of each step."""
    pieces = []
    for group in by_machine(rows):
        pieces.append(where(group))
        for title, of_step in by_workload(group).items():
            for variant in dict.fromkeys(row["variant"] for row in of_step):
                runs = {}
                for row in of_step:
                    if row["variant"] == variant:
                        runs.setdefault(str(row.get("date")), []).append(row)
                last = runs[max(runs)]
                pieces.append(f"<h3>{html.escape(f'{title}, {variant}')}</h3>")
                pieces.append(notes([summary(last), *ceilings_of(last)]) + grid(*lines(last, 96), hardware(last)))
                pieces.append(notes(older(sum(map(len, runs.values())) - len(last))))
        pieces.append(notes(missing(group)))
    return "".join(pieces)
