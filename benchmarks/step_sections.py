"""The report's sections on the step: time by variant, the ablation, and how far two runs of one version agree."""

import html
from collections.abc import Callable

from meanflow.peaks import PEAKS

from . import plots
from .markup import (
    NONE, Page, by_workload, figures_of, gib, grid, notes, number, older, percent, spread, where, workload
)  # fmt: skip
from .regression import ITSELF, agrees
from .rows import by_machine, device_name, hardware, missing, newest, why_untimed
from .variants import VARIANTS, left_out

ORDER = {name: place for place, name in enumerate(VARIANTS)}


def speed(row: dict, base: str, rows: list[dict]) -> tuple[float, ...] | None:
    """How many times as fast as the variant ``base``: the pairs' median and quantiles, or a ratio of medians."""
    if found := (row.get("times") or {}).get(base):
        return found["50"], found["20"], found["80"]
    other = next((r for r in rows if r["variant"] == base and r["ms"]), None)
    return None if other is None else (other["ms"] / row["ms"],)


def speed_words(found: tuple[float, ...] | None) -> str:
    if found is None:
        return NONE
    value = f"{found[0]:.2f}"
    return value if len(found) == 1 else f"{value} ({found[1]:.2f} to {found[2]:.2f})"


def step_table(rows: list[dict], caption: str) -> str:
    named = [base for row in rows for base in row.get("times") or {}]
    present = [row["variant"] for row in rows]
    bases = [b for b in dict.fromkeys(["naive", "naive-compiled", *named]) if b in present or b in named]
    header = ["=variant", "ms a step", "20 to 80 %, ms", "images/s", *(f"times as fast as {base}" for base in bases)]
    columns: dict[str, Callable[[dict], str]] = {
        "first step, s": lambda row: number(row.get("first_step_seconds"), 3),
        "MFU": lambda row: percent(row.get("mfu")),
        "J/image": lambda row: number(row.get("joules_per_image"), 3),
        "W": lambda row: number(row.get("watts"), 3),
    }
    filled = {name: cell for name, cell in columns.items() if any(cell(row) != NONE for row in rows)}
    lines = [
        [row["variant"], number(row["ms"]), spread(row), number(row["images_per_second"])]
        + [speed_words(speed(row, base, rows)) for base in bases]
        + [cell(row) for cell in filled.values()]
        for row in rows
    ]
    return grid(header + list(filled), lines, caption)


def mfu_note(rows: list[dict]) -> list[str]:
    rows = [row for row in rows if row.get("mfu") and row.get("needed_flops")]
    if not rows:
        return []
    peak = PEAKS.get(rows[0]["gpu"])
    sheet = f" ({peak.tflops:g} TFLOP/s, {peak.source})" if peak else ""
    words = "MFU: the matrix products that the recipe needs, counted without padding, over the step's time and the "
    return [words + f"datasheet's dense 16-bit peak{sheet}."]


def timed(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row.get("ms")]


def not_timed(rows: list[dict]) -> list[str]:
    """Words for the variants without a time."""
    return [f"{row['variant']} was not timed: {why}." for row in rows if (why := why_untimed(row))]


def is_ablation(row: dict) -> bool:
    """Whether a row's run compares our step with itself without an ingredient."""
    first, *others = row.get("compared") or [row["variant"]]
    return first in ("ours", "ours-eager") and any(left_out(name) for name in others)


def headline(page: Page, rows: list[dict]) -> str:
    parts = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (workload(row), row["variant"]))
        tables, figures, ratios, words = [], [], {}, {}
        for title, found in by_workload(group).items():
            lacking, found = not_timed(found), timed(found)
            if not found:
                tables.append(f"<h3>{html.escape(title)}</h3>" + notes(lacking))
                continue
            tables.append(f"<h3>{html.escape(title)}</h3>" + step_table(found, hardware(found)) + notes(lacking))
            labels = {}
            for row in found:
                against = speed(row, "naive", found)
                labels[row["variant"]] = f"{number(row['ms'])} ms"
                if against and row["variant"] != "naive":
                    labels[row["variant"]] += f", {against[0]:.2f} x naive"
                    if row["variant"] == "ours":
                        ratios[title], words[title] = against, f"{speed_words(against)} x"
            bars = {row["variant"]: (row["ms"], row["ms_20"], row["ms_80"]) for row in found}
            figure = plots.bars(f"Training step: {title}", hardware(found), "ms a step (20 to 80 %)", bars, labels)
            figures.append(page.figure(f"step {title} {device_name(found[0])}", figure))
        if len(ratios) > 1:
            title = "Speed of our step over the naive one"
            figure = plots.bars(title, hardware(group), "times as fast (20 to 80 %)", ratios, words, plots.OURS[0])
            figures.insert(0, page.figure(f"speed {device_name(group[0])}", figure))
        several = ["Speeds with a spread are of pairs of one run, those without one are ratios of medians."]
        lines = several + mfu_note(group) + older(left_over) + missing(group)
        parts.append(where(group) + figures_of(figures) + "".join(tables) + notes(lines))
    return "".join(parts)


def slowdown(row: dict) -> tuple[float, ...] | None:
    """The time of a variant over that of the first of its run: the pairs' median and quantiles."""
    found = (row.get("times") or {}).get(row["compared"][0])
    return None if found is None else (1 / found["50"], 1 / found["80"], 1 / found["20"])


def ablation(page: Page, rows: list[dict]) -> str:
    parts = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (workload(row), row["compared"][0], row["variant"]))
        tables, figures = [], []
        for title, of_step in by_workload(group).items():
            for first in dict.fromkeys(row["compared"][0] for row in of_step):
                found = [row for row in of_step if row["compared"][0] == first]
                found.sort(key=lambda row: ORDER.get(row["variant"], len(ORDER)))
                tables.append(f"<h3>{html.escape(title)}</h3>" + ablation_table(found, first))
                ratios = {row["variant"]: ratio for row in timed(found) if (ratio := slowdown(row))}
                if ratios:
                    words = {name: f"{speed_words(ratio)} x" for name, ratio in ratios.items()}
                    unit = f"time over that of {first} (20 to 80 %)"
                    figure = plots.bars(f"Without an ingredient: {title}", hardware(found), unit, ratios, words)
                    figures.append(page.figure(f"ablation {first} {title} {device_name(found[0])}", figure))
        what = "Each leaves one ingredient out of the step that all are compared with; more than 1 is slower than it."
        lines = [what] + older(left_over) + missing(group)
        parts.append(where(group) + figures_of(figures) + "".join(tables) + notes(lines))
    return "".join(parts)


def ablation_table(rows: list[dict], first: str) -> str:
    lines = []
    for row in rows:
        without = left_out(row["variant"]) if row["variant"] != first else "nothing"
        if why := why_untimed(row):
            cells = ["not timed", NONE, NONE, NONE, NONE]
            without = f"{without}; not timed: {why}"
        else:
            cells = [number(row["ms"]), spread(row), speed_words(slowdown(row)), number(gib(row))]
            cells.append(number(row.get("first_step_seconds"), 3))
        lines.append([row["variant"], without or NONE, *cells])
    header = ["=variant", "=left out", "ms a step", "20 to 80 %, ms", f"time over {first}", "peak, GiB"]
    return grid([*header, "first step, s"], lines, hardware(rows))


def agreement(page: Page, rows: list[dict]) -> str:
    parts = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (workload(row), row["variant"], row["base"]))
        lines = []
        for row in group:
            ratio, twice = row["ratio"], row["base"] == ITSELF
            within = ("yes" if agrees(ratio) else "NO") if twice else NONE
            against = "the same version a second time" if twice else f"revision {row['base']}"
            lines.append([workload(row), row["variant"], against, number(row["ms"]), number(row["base_ms"])])
            lines[-1] += [f"{ratio['50']:.3f} ({ratio['20']:.3f} to {ratio['80']:.3f})", str(row["turns"]), within]
        header = ["=step", "=variant", "=against", "ms a step", "the other's, ms", "time over the other's", "pairs"]
        what = "Two processes make the same steps in turns; the ratio is the median over the pairs (20 to 80 %)."
        parts.append(where(group) + grid([*header, "1 within the spread"], lines, hardware(group)))
        parts.append(notes([what] + older(left_over) + missing(group)))
    return "".join(parts)
