"""The report's sections on what others reach: public kernels beside ours, and cuBLAS on the step's products."""

import html

from ..harness.rows import by_machine, device_name, hardware, missing, newest
from . import plots, sections
from .markup import NONE, Page, figures_of, grid, notes, number, older, power, spread, where

PUBLIC = "public kernels"
"""The ``bench`` of rows that time others' kernels and ours in one process."""


def is_beside_others(row: dict) -> bool:
    """True if a kernel's row was taken beside public kernels, which are measured as their authors ship them."""
    return row.get("bench") == PUBLIC


def public_kernels(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (row["op"], row["shape"], row["dtype"], row["variant"]))
        tables, figures = [], []
        for op, shape in dict.fromkeys((row["op"], row["shape"]) for row in group):
            found = sorted((r for r in group if (r["op"], r["shape"]) == (op, shape)), key=lambda row: row["ms"])
            found.sort(key=lambda row: row["call"])
            title = f"{op}, {shape} {found[0]['dtype']}"
            tables.append(f"<h3>{html.escape(title)}</h3>" + public_table(found))
            dual = [row for row in found if row["call"] == "dual"]
            rates = {row["variant"]: (row["flops"] / row["ms"] / 1e9,) for row in dual}
            words = {row["variant"]: f"{number(rates[row['variant']][0], 3)} TFLOP/s" for row in dual}
            known = plots.two_colours(rates)
            figure = plots.bars(f"Primal and tangent: {title}", hardware(found), "TFLOP/s", rates, words, known)
            figures.append(page.figure(f"public kernels {title} {device_name(found[0])}", figure))
        lines = [
            (
                "All in one process, each checked against fp64, device time with a cold L2 cache. FLOPs are what the "
                "head dim asked for needs, whatever a kernel pads it to; padding and changes of layout come before the "
                "clock."
            ),
        ]
        sources = {row["variant"].split()[0]: row for row in group if row.get("peer")}
        revisions = {name: row.get("peer_commit") or "revision not recorded" for name, row in sources.items()}
        named = (f"{name}: {row['peer']} ({revisions[name]})" for name, row in sources.items())
        lines += [f"Others' kernels: {', '.join(named)}."] if sources else []
        lines += sections.flush_note(group)
        pieces.append(where(group) + figures_of(figures) + "".join(tables))
        pieces.append(notes(lines + older(left_over) + missing(group)))
    return "".join(pieces)


def public_table(rows: list[dict]) -> str:
    """The fastest first, each over our kernel of the same call."""
    ours = {}
    for row in rows:
        if row["variant"].startswith("ours"):
            ours.setdefault(row["call"], row["ms"])
    lines = []
    for row in rows:
        against = f"{row['ms'] / ours[row['call']]:.2f}" if row["call"] in ours else NONE
        errors = (power(row.get(name)) for name in ("error", "error_dot"))
        rate = f"{number(row['flops'] / row['ms'] / 1e9)}"
        lines.append([row["call"], row["variant"], number(row["ms"]), spread(row), rate, against, *errors])
        lines[-1].append(row.get("note") or NONE)
    header = ["=call", "=variant", "ms", "20 to 80 %, ms", "TFLOP/s", "ms over our fastest", "error", "tangent's error"]
    return grid([*header, "=how"], lines, hardware(rows))


def products(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (row["step"], row["layer"], row["pass"], row["dtype"]))
        passes = list(dict.fromkeys(row["pass"] for row in group))
        lines = {}
        for row in group:
            key = (row["step"], row["layer"], *(str(row[name]) for name in "mkn"))
            lines.setdefault(key, {})[row["pass"]] = number(row["tflops"])
        cells = [[*key, *(found.get(name, NONE) for name in passes)] for key, found in lines.items()]
        header = ["=step", "=layer", "m", "k", "n", *(f"{name}, TFLOP/s" for name in passes)]
        copies = dict.fromkeys(row["copy_gbps"] for row in group if row.get("copy_gbps"))
        words = [f"A large copy reaches {number(copy)} GB/s here." for copy in copies]
        pieces.append(where(group) + grid(header, cells, hardware(group)))
        pieces.append(notes(words + older(left_over) + missing(group)))
    return "".join(pieces)
