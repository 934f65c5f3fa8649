"""Ratios of two rows: by pairs of steps of the same inputs if both rows kept them, else of medians.

A ratio says where one of its rows was timed before anybody had compared its gradient: MARK stands beside it.
"""

from collections.abc import Iterable

from ..harness.clock import quantiles
from ..harness.rows import machine
from .markup import NONE

MARK = "†"
FEWEST = 3
"""Pairs without which there is no spread."""
STEP = ("model", "batch", "tokens", "precision", "omega", "kappa", "interval", "share", "direction", "guidance_input")
"""The columns that say which step was made; the last two are None, or not there, for MeanFlow's own."""


def same_step(row: dict, other: dict) -> bool:
    """True if two rows are of one step on one machine, with the same versions and commit."""
    return machine(row) == machine(other) and all(row.get(name) == other.get(name) for name in STEP)


def uncompared(row: dict, rows: Iterable[dict]) -> bool:
    """True if a step was timed although its gradient was compared with that of no other variant among ``rows``."""
    if row.get("gradient_against"):
        return False
    return not any(r.get("gradient_against") == row["variant"] and same_step(r, row) for r in rows)


def uncompared_note(rows: list[dict], among: Iterable[dict] | None = None) -> list[str]:
    """The note that explains MARK: the variants of ``rows`` whose gradient was compared with none ``among`` them."""
    among = rows if among is None else list(among)
    found = dict.fromkeys(
        f"{row['variant']} (another program)" if row.get("peer") else row["variant"]
        for row in rows
        if row.get("ms") and uncompared(row, among)
    )
    return [f"{MARK} Timed without a compared gradient: {', '.join(found)}."] if found else []


def paired(row: dict, base: dict) -> list[float]:
    """The base's time over the row's, of each pair of steps of the same inputs; empty where there are no pairs."""
    if not same_step(row, base):
        return []
    pairs = list(zip(base.get("step_ms") or (), row.get("step_ms") or (), strict=False))
    return [b / a for b, a in pairs] if len(pairs) >= FEWEST else []


def speed(row: dict, base: str, rows: list[dict]) -> tuple[float, ...] | None:
    """Speed-up of a step over the variant ``base`` among ``rows``, which are of the same step.

    Median, 20 and 80 % quantile over the pairs: of both rows' steps, or as the process found them that made both. The
    ratio of the medians alone where there are no pairs, None where there is no such variant.
    """
    other = next((r for r in rows if r["variant"] == base and r["ms"]), None)
    pairs = paired(row, other) if other and other is not row else []
    if pairs:
        low, middle, high = quantiles(pairs)
        return middle, low, high
    if found := (row.get("times") or {}).get(base):
        return found["50"], found["20"], found["80"]
    return None if other is None else (other["ms"] / row["ms"],)


def slowdown(row: dict, base: str, rows: list[dict]) -> tuple[float, ...] | None:
    """The time of a step over that of the variant ``base``, as ``speed`` finds it."""
    found = speed(row, base, rows)
    if found is None or len(found) == 1:
        return found and (1 / found[0],)
    middle, low, high = found
    return 1 / middle, 1 / high, 1 / low


def mark(row: dict, base: str, rows: list[dict]) -> str:
    """MARK behind a ratio of a row and the variant ``base``, or nothing."""
    both = [row, *(r for r in rows if r["variant"] == base)]
    return f" {MARK}" if row["variant"] != base and any(uncompared(r, rows) for r in both) else ""


def speed_words(found: tuple[float, ...] | None) -> str:
    """A ratio, with its spread where it has one."""
    if found is None:
        return NONE
    value = f"{found[0]:.2f}"
    return value if len(found) == 1 else f"{value} ({found[1]:.2f} to {found[2]:.2f})"


ITSELF = "itself"


def agrees(ratio: dict) -> bool:
    """True if 1 lies within the spread of a ratio."""
    return ratio["20"] <= 1 <= ratio["80"]
