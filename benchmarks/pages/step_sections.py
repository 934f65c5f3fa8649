"""The report's sections on the step: time by variant, the ablation, and how far two runs of one version agree."""

import html
from collections.abc import Callable, Iterable

from matplotlib.figure import Figure

from meanflow.training.peaks import PEAKS

from ..harness.rows import by_machine, device_name, hardware, missing, newest, why_untimed
from ..workloads.step_variants import VARIANTS, left_out
from . import plots
from .markup import (
    NONE,
    Page,
    by_workload,
    figures_of,
    gib,
    grid,
    notes,
    number,
    older,
    percent,
    spread,
    where,
    workload,
)
from .ratios import ITSELF, agrees, mark, slowdown, speed, speed_words, uncompared_note

WHOLE = ("ours", "ours-eager")
"""The steps that have every ingredient."""
ORDER = {name: place for place, name in enumerate(VARIANTS)}


def ordered(rows: list[dict]) -> list[dict]:
    """Other programs first, then the variants as they are listed: ours last."""
    return sorted(rows, key=lambda row: -1 if row.get("peer") else ORDER.get(row["variant"], len(ORDER)))


def step_table(rows: list[dict], caption: str, *, several: bool = False) -> str:
    """Steps of one workload with their ratios, or of ``several``, which have none."""
    named = [base for row in rows for base in row.get("times") or {}]
    present = [row["variant"] for row in rows]
    peers = [row["variant"] for row in rows if row.get("peer")]
    bases = dict.fromkeys([*peers, "naive", "naive-compiled", *named])
    bases = [] if several else [base for base in bases if base in present or base in named]
    header = ["=step"] * several + ["=variant", "ms a step", "20 to 80 %, ms", "images/s"]
    header += [f"times as fast as {base}" for base in bases]
    columns: dict[str, Callable[[dict], str]] = {
        "peak, GiB": lambda row: number(gib(row), 3),
        "first step, s": lambda row: number(row.get("first_step_seconds"), 3),
        "MFU": lambda row: percent(row.get("mfu")),
        "J/image": lambda row: number(row.get("joules_per_image"), 3),
        "W": lambda row: number(row.get("watts"), 3),
    }
    filled = {name: cell for name, cell in columns.items() if any(cell(row) != NONE for row in rows)}
    lines = [
        [workload(row)] * several
        + [row["variant"], number(row["ms"]), spread(row), number(row["images_per_second"])]
        + [speed_words(speed(row, base, rows)) + mark(row, base, rows) for base in bases]
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


def timed(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if row.get("ms")]


def not_timed(rows: list[dict]) -> list[str]:
    """A line for each variant without a time."""
    return [f"{row['variant']} was not timed: {why}." for row in rows if (why := why_untimed(row))]


def is_ablation(row: dict) -> bool:
    """True for the ablation's rows: their run times our step without an ingredient, alone or beside the whole."""
    first, *others = row.get("compared") or [""]
    return bool(left_out(first)) if not others else first in WHOLE and any(left_out(name) for name in others)


def may_be_whole(row: dict) -> bool:
    """True if a row is of the whole step, which steps without an ingredient are compared with across runs."""
    return row["variant"] in WHOLE


def whole_of(row: dict) -> str:
    """The variant that an ablation's row is compared with."""
    first, *others = row.get("compared") or [row["variant"]]
    return first if others else WHOLE[-1] if row["variant"].startswith(f"{WHOLE[-1]}-") else WHOLE[0]


def headline(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (workload(row), row["variant"]))
        tables, figures, ratios, words, alone = [], [], {}, {}, []
        for title, found in by_workload(group).items():
            lacking, found = not_timed(found), ordered(timed(found))
            if len(found) == 1 and not lacking:
                alone += found
                continue
            tables.append(f"<h3>{html.escape(title)}</h3>")
            if found:
                tables.append(step_table(found, hardware(found)) + notes(uncompared_note(found)))
                figures.append(page.figure(f"step {title} {device_name(found[0])}", step_figure(title, found)))
            tables.append(notes(lacking))
            for row in found:
                if row["variant"] == "ours" and (against := speed(row, "naive", found)):
                    ratios[title], words[title] = against, f"{speed_words(against)} x{mark(row, 'naive', found)}"
        if len(ratios) > 1:
            title, line = "Speed of our step over the naive one", " ".join([hardware(group), *uncompared_note(group)])
            known = dict.fromkeys(ratios, plots.OURS[0])
            figure = plots.bars(title, line, "times as fast (20 to 80 %)", ratios, words, known)
            figures.insert(0, page.figure(f"speed {device_name(group[0])}", figure))
        if alone:
            tables.append("<h3>Steps of one variant alone</h3>" + step_table(alone, hardware(alone), several=True))
            tables.append(notes(uncompared_note(alone)))
        lines = ["Speeds with a spread are of pairs of steps of the same inputs, those without are ratios of medians."]
        lines += other_programs(group) + mfu_note(group) + older(left_over) + missing(group)
        pieces.append(where(group) + figures_of(figures) + "".join(tables) + notes(lines))
    return "".join(pieces)


def step_figure(title: str, rows: list[dict]) -> Figure:
    """A bar a variant."""
    labels = {}
    for row in rows:
        labels[row["variant"]] = f"{number(row['ms'])} ms"
        against = speed(row, "naive", rows)
        if against and row["variant"] != "naive" and not row.get("peer"):
            labels[row["variant"]] += f", {against[0]:.2f} x naive{mark(row, 'naive', rows)}"
    bars = {row["variant"]: (row["ms"], row["ms_20"], row["ms_80"]) for row in rows}
    line = " ".join([hardware(rows), *uncompared_note(rows)])
    return plots.bars(f"Training step: {title}", line, "ms a step (20 to 80 %)", bars, labels)


def other_programs(rows: list[dict]) -> list[str]:
    """Whose steps are not ours, and how they were run."""
    found = {row["variant"]: row for row in rows if row.get("peer")}
    return [f"{name} (commit {row.get('peer_commit') or 'unknown'}): {row['note']}." for name, row in found.items()]


def ablation(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        whole, _ = newest(timed(filter(may_be_whole, group)), lambda row: (workload(row), row["variant"]))
        group, left_over = newest(
            [row for row in group if is_ablation(row)], lambda row: (workload(row), whole_of(row), row["variant"])
        )
        if not group:
            continue
        tables, figures = [], []
        for title, of_step in by_workload(group).items():
            for first in dict.fromkeys(whole_of(row) for row in of_step):
                found = [row for row in of_step if whole_of(row) == first]
                if all(row["variant"] != first for row in found):
                    found += [row for row in whole if (workload(row), row["variant"]) == (title, first)]
                found = ordered(found)
                tables.append(f"<h3>{html.escape(title)}</h3>" + ablation_table(found, first))
                tables.append(notes(uncompared_note(found)))
                others = [row for row in timed(found) if row["variant"] != first]
                ratios = {row["variant"]: ratio for row in others if (ratio := slowdown(row, first, found))}
                if ratios:
                    words = {
                        row["variant"]: f"{speed_words(ratios[row['variant']])} x{mark(row, first, found)}"
                        for row in others
                        if row["variant"] in ratios
                    }
                    unit = f"time over that of {first} (20 to 80 %)"
                    figure = plots.bars(f"Without an ingredient: {title}", hardware(found), unit, ratios, words)
                    figures.append(page.figure(f"ablation {first} {title} {device_name(found[0])}", figure))
        what = "Each leaves one ingredient out of the step that all are compared with; more than 1 is slower than it."
        lines = [what] + older(left_over) + missing(group)
        pieces.append(where(group) + figures_of(figures) + "".join(tables) + notes(lines))
    return "".join(pieces)


def ablation_table(rows: list[dict], first: str) -> str:
    lines = []
    for row in rows:
        without = left_out(row["variant"]) if row["variant"] != first else "nothing"
        if why := why_untimed(row):
            cells = ["not timed", NONE, NONE, NONE, NONE]
            without = f"{without}; not timed: {why}"
        else:
            ratio = None if row["variant"] == first else slowdown(row, first, rows)
            words = speed_words(ratio) + mark(row, first, rows)
            cells = [number(row["ms"]), spread(row), words, number(gib(row))]
            cells.append(number(row.get("first_step_seconds"), 3))
        lines.append([row["variant"], without or NONE, *cells])
    header = ["=variant", "=left out", "ms a step", "20 to 80 %, ms", f"time over {first}", "peak, GiB"]
    return grid([*header, "first step, s"], lines, hardware(rows))


def agreement(page: Page, rows: list[dict]) -> str:
    pieces = []
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
        pieces.append(where(group) + grid([*header, "1 within the spread"], lines, hardware(group)))
        pieces.append(notes([what] + older(left_over) + missing(group)))
    return "".join(pieces)
