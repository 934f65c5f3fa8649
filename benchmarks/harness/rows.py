"""Rows of results: reading them, telling their kinds apart, and saying where and when they were taken."""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from meanflow.config import ObjectiveConfig
from meanflow.errors import UserError

from .environment import environment, merge

REQUIRED = {
    "kernel": ("op", "shape", "dtype", "variant", "ms", "ms_20", "ms_80", "flops", "bytes", "bound", "ceiling"),
    "step": ("model", "batch", "precision", "variant", "ms", "ms_20", "ms_80", "images_per_second"),
    "breakdown": ("model", "batch", "precision", "variant", "by", "ms"),
    "step-kernel": ("model", "batch", "variant", "kernel", "activity", "kernel_kind", "ms", "launches", "wall_ms"),
    "scaling": ("axis", "model", "batch", "variant"),
    "regression": ("variant", "base", "model", "batch", "precision", "ms", "base_ms", "ratio", "turns"),
    "tune": ("op", "shape", "dtype", "table", "config", "entry", "ms", "ms_20", "ms_80"),
    "optimizer": ("implementation", "model", "parameters", "ms", "ms_20", "ms_80", "bytes", "copy_gbps"),
    "inference": ("part", "variant", "model", "batch", "precision", "ms", "ms_20", "ms_80", "images_per_second"),
    "accounting": ("preset", "batch", "precision", "parts", "forward_flops", "step_in_forwards"),
    "projection": ("preset", "gpu", "hours"),
    "product": ("step", "layer", "pass", "m", "k", "n", "dtype", "tflops"),
    "part": ("part", "outcome", "seconds"),
}
"""The kinds of rows, and the columns without which one is not shown. Rows without a time (of a step, of sampling, of a
launch config) and kernels without a measured ceiling are shown where they give the reason. Columns keep the names that
the committed rows have: a step's passes are "parts" there, and what was sampled is a "part"."""
TIMED = ("ms", "ms_20", "ms_80", "images_per_second")

THROTTLE = {
    0x4: "software power cap", 0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal",
    0x80: "power brake",
}  # fmt: skip
"""NVML's bits (nvmlClocksEventReasons) that mean a GPU ran slower than it was asked to."""


@dataclass
class Rows:
    """The rows of files by kind, and those that no section can show."""

    by_kind: dict[str, list[dict]] = field(default_factory=lambda: {kind: [] for kind in REQUIRED})
    unknown: int = 0
    incomplete: list[str] = field(default_factory=list)

    def add(self, row: dict, place: str) -> None:
        """Sort a row in; ``place`` says where it stands."""
        kind = kind_of(row)
        if kind not in REQUIRED:
            self.unknown += 1
        elif lacking := [name for name in REQUIRED[kind] if row.get(name) is None and not explained(row, kind, name)]:
            self.incomplete.append(f"{place}: a row of kind {kind} lacks {', '.join(lacking)}")
        else:
            self.by_kind[kind].append(row | {"kind": kind})

    @property
    def shown(self) -> list[dict]:
        """All rows of known kinds."""
        return [row for rows in self.by_kind.values() for row in rows]


def explained(row: dict, kind: str, name: str) -> bool:
    """True if a row gives the reason why it lacks a column: it was not timed, or no ceiling was measured beside it."""
    if kind == "kernel" and name == "ceiling":
        return name in (row.get("missing") or {})
    return kind in ("step", "inference", "tune") and name in TIMED and why_untimed(row) is not None


def why_untimed(row: dict) -> str | None:
    """The reason why a row has no time; None if it has one."""
    return None if row.get("ms") else (row.get("missing") or {}).get("ms")


def kind_of(row: dict) -> str:
    """The kind of a row: its own column, else told from its other columns, else "unknown"."""
    tells = {
        "scaling": ("axis",),
        "regression": ("base", "ratio"),
        "inference": ("part", "steps", "model"),
        "kernel": ("op", "shape", "variant"),
        "tune": ("table", "entry"),
        "optimizer": ("implementation",),
        "step": ("variant", "model", "images_per_second"),
        "breakdown": ("by", "ms"),
        "step-kernel": ("kernel", "launches"),
        "accounting": ("step_in_forwards",),
        "projection": ("preset", "hours"),
        "product": ("layer", "pass", "tflops"),
    }
    return row.get("kind") or next((kind for kind, names in tells.items() if all(n in row for n in names)), "unknown")


def parse(text: str, place: str) -> list[tuple[int, dict]]:
    """The rows of a text with their line numbers: JSON lines, or one JSON object over several lines.

    Raises:
        UserError: naming ``place`` and the line that is no JSON object.
    """
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict):
        return [(1, flat(whole))]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{place}, line {number}: got {line[:60]!r}, wanted a JSON object; repair or delete it")
        found.append((number, flat(row)))
    return found


def flat(row: dict) -> dict:
    """The row with its environment among its columns."""
    return {k: v for k, v in row.items() if k != "environment"} | (row.get("environment") or {})


def read(paths: Iterable[Path]) -> Rows:
    """The rows of files, and of the ``*.jsonl`` files in folders.

    Raises:
        UserError: for a path that is not there, and for a broken line.
    """
    rows = Rows()
    for path in paths:
        if not path.exists():
            raise UserError(f"ROWS: got {path}, which is not there, wanted files of JSON lines or folders of them")
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            try:
                text = file.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"ROWS: got {file}, which cannot be read ({error}), wanted JSON lines") from None
            for number, row in parse(text, str(file)):
                rows.add(row, f"{file}, line {number}")
    return rows


# --- where and when ---


def machine(row: dict) -> tuple:
    """The columns that all rows of one table must share: hardware, versions and commit."""
    names = ("device", "gpu", "cpu", "threads", "driver", "torch", "triton", "commit")
    return tuple(row.get(name) for name in names)


def by_machine(rows: list[dict]) -> list[list[dict]]:
    """The rows in groups of one machine, versions and commit, GPUs and the latest first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(machine(row), []).append(row)

    def order(group: list[dict]) -> tuple[bool, str]:
        return bool(group[0].get("gpu")), max(str(row.get("date")) for row in group)

    return sorted(groups.values(), key=order, reverse=True)


def device_name(row: dict) -> str:
    """The GPU's name, or "CPU" with the processor's."""
    if row.get("gpu"):
        return row["gpu"]
    if row.get("device") == "cpu":
        threads = row.get("threads")
        return f"CPU ({row.get('cpu') or 'unknown'}" + (f", {threads} threads)" if threads else ")")
    return "hardware not recorded"


def hardware(rows: list[dict]) -> str:
    """Hardware, driver, clocks, versions, commits and dates of rows of one machine, in a line."""
    row, words = rows[0], [device_name(rows[0])]
    if row.get("gpu"):
        words.append(f"driver {row.get('driver') or 'unknown'}")
        words.append(clock_words(rows))
    words += [f"{name} {row.get(name) or 'none'}" for name in ("torch", "triton")]
    words.append(f"commit {' and '.join(dict.fromkeys(short_commit(row) for row in rows))}")
    dates = sorted({str(r["date"])[:10] for r in rows if r.get("date")})
    words.append(" to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "date unknown")
    return ", ".join(words)


def short_commit(row: dict) -> str:
    """Twelve digits, and whether the tree was modified."""
    commit, dash, state = (row.get("commit") or "unknown").partition("-")
    return f"{commit[:12]}{dash}{state}"


def clock_words(rows: list[dict]) -> str:
    """The range of the clocks in the rows, and whether the GPU was held back."""
    words = []
    for name, title in (("sm_mhz", "SM"), ("memory_mhz", "memory")):
        if values := [row[name] for row in rows if row.get(name)]:
            words.append(f"{title} {' to '.join(str(v) for v in dict.fromkeys((min(values), max(values))))} MHz")
    held = [row for row in rows if (row.get("throttle_bits") or 0) & sum(THROTTLE)]
    reasons = [reason for bit, reason in THROTTLE.items() if any(row["throttle_bits"] & bit for row in held)]
    some = f" in {len(held)} of {len(rows)} rows" if len(held) < len(rows) else ""
    return ", ".join(words or ["clocks unknown"]) + (f", throttled{some} ({', '.join(reasons)})" if held else "")


def newest(rows: list[dict], name: Callable[[dict], object]) -> tuple[list[dict], int]:
    """The newest row of each name, in order, and the number of older ones."""
    last: dict[object, dict] = {}
    for row in sorted(rows, key=lambda row: str(row.get("date"))):
        last[name(row)] = row
    kept = [row for row in rows if last[name(row)] is row]
    return kept, len(rows) - len(kept)


def missing(rows: list[dict]) -> list[str]:
    """A line for each reason why a column is missing."""
    reasons = (
        f"Missing: {column} ({why})."
        for row in rows
        for column, why in (row.get("missing") or {}).items()
        # its own line says that
        if why != why_untimed(row)
    )
    return list(dict.fromkeys(reasons))


def append(rows: list[dict], options: argparse.Namespace, path: Path | None = None) -> list[dict]:
    """Add environment and date to rows, append them to ``path`` (default: the file of --rows), and return them."""
    # one date for all of them
    where, path = environment(options.device, options.commit), path or options.rows
    rows = [merge(row, where) for row in rows]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def rate(row: dict) -> tuple[float, str]:
    """The rate of a call and its unit: FLOPs over time if products bound it, else bytes over time."""
    if row["bound"] == "gemm":
        return row["flops"] / row["ms"] / 1e9, "TFLOP/s"
    return row["bytes"] / row["ms"] / 1e6, "GB/s"


def objective_columns(objective: ObjectiveConfig) -> dict:
    """The columns of a step's row that say what it minimises; the last two are None for MeanFlow's own, as in rows
    without them.
    """
    direction, told = objective.direction, objective.guidance_input
    return {
        "omega": objective.omega,
        "kappa": objective.kappa,
        "interval": [objective.guidance_start, objective.guidance_end],
        "share": 1 - objective.share_equal,
        "direction": None if direction == "guided" else direction,
        "guidance_input": None if told == "none" else told,
    }


def objective_words(row: dict) -> dict[str, str]:
    """What a step's row says of its objective, in words, by column."""
    words = {}
    if drawn := row.get("guidance_input"):
        words["guidance_input"] = {"omega": "omega drawn", "interval": "omega and interval drawn"}[drawn]
    else:
        words |= {name: f"{name} {row[name]:g}" for name in ("omega", "kappa") if name in row}
        if "interval" in row:
            words["interval"] = f"t in [{row['interval'][0]:g}, {row['interval'][1]:g}]"
    if direction := row.get("direction"):
        words["direction"] = {"v_head": "along v", "boundary": "along u(z, t, t)"}[direction]
    if "share" in row:
        words["share"] = f"r != t {row['share']:.0%}"
    return words
