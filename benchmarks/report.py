"""One HTML file from rows of results: ``python -m benchmarks.report ROWS... --out DIR``.

ROWS are files of JSON lines, or folders of them. DIR/report.html opens offline: the plots are in it; each is also
written as PNG and SVG. Speeds, rates and shares are computed from the rows' milliseconds, FLOPs and bytes.
"""

import argparse
import html
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meanflow.errors import UserError

from .harness.rows import Rows, by_machine, clock_words, device_name, missing, read
from .pages import kernel_table, peer_sections, sections, step_sections, tuned_configs
from .pages.markup import NONE, Page, grid, notes, number

CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff }
body { max-width: 72rem; margin: auto; padding: 0 1rem 4rem }
h1 { font-size: 1.5rem } h3 { font-size: 1rem; margin: 1.6rem 0 .3rem }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
caption { text-align: left; color: #555; font-size: 12px; padding: .2rem 0; caption-side: bottom }
th, td { padding: .15rem .45rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; min-width: 3rem; max-width: 6.5rem }
td.words, th.words { text-align: left }
td.long { white-space: normal; min-width: 13rem; max-width: 26rem }
.scroll { overflow-x: auto; margin: .5rem 0 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
.figures { margin: .8rem 0 }
figure { margin: 0 } figure svg { width: 100%; max-width: 46rem; height: auto }
td.long { overflow-wrap: anywhere }
.hardware, .note { color: #555; font-size: 13px } .note { margin: .2rem 0 }
.badge { background: #8a4b00; color: #fff; border-radius: .2rem; padding: 0 .4rem; font-size: 12px }
.failed { color: #a40000; font-weight: 600 } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto }
nav a { margin-right: 1rem; display: inline-block } a { color: #00558c }
"""


@dataclass(frozen=True)
class Section:
    """A chapter of the report."""

    title: str
    kind: str
    command: str | None
    """The command that makes its rows; None if they were taken by hand."""
    write: Callable[[Page, list[dict]], str]
    wanted: Callable[[dict], bool] = lambda row: True
    """True for the rows of the kind that it shows."""
    beside: Callable[[dict], bool] = lambda row: False
    """True for further rows that those are compared with; without rows to show they are not used."""


SECTIONS = {
    "headline": Section(
        "Step time by variant",
        "step",
        "python -m benchmarks.step",
        step_sections.headline,
        lambda row: not step_sections.is_ablation(row),
    ),  # fmt: skip
    "ablation": Section(
        "Ablation: our step without one ingredient",
        "step",
        "python -m benchmarks.step --compare ours,ours-no-kernels,ours-eager",
        step_sections.ablation,
        step_sections.is_ablation,
        step_sections.may_be_whole,
    ),  # fmt: skip
    "breakdown": Section("Where the time goes", "breakdown", "python -m benchmarks.breakdown", sections.breakdown),
    "step-kernels": Section(
        "Kernels of a step", "step-kernel", "python -m benchmarks.breakdown --kernels FILE", kernel_table.section
    ),  # fmt: skip
    "kernels": Section(
        "Kernels",
        "kernel",
        "python -m pytest benchmarks/bench_*.py --rows FILE",
        sections.kernels,
        lambda row: not peer_sections.is_beside_others(row),
    ),  # fmt: skip
    "public": Section(
        "Our dual attention beside public kernels",
        "kernel",
        None,
        peer_sections.public_kernels,
        peer_sections.is_beside_others,
    ),  # fmt: skip
    "products": Section(
        "What cuBLAS reaches on the step's products",
        "product",
        None,
        peer_sections.products,
    ),  # fmt: skip
    "tune": Section(
        "Launch configs against the shipped ones", "tune", "python -m benchmarks.tune", tuned_configs.tuned
    ),
    "memory": Section(
        "Memory",
        "step",
        "python -m benchmarks.step on a GPU (a CPU's peak is not measured)",
        sections.memory,
        lambda row: bool(row.get("peak_bytes")),
    ),  # fmt: skip
    "scaling": Section(
        "Scaling over batch, tokens and model", "scaling", "python -m benchmarks.scaling", sections.scaling
    ),
    "agreement": Section(
        "The same version twice, and against others",
        "regression",
        "python -m benchmarks.regression --self-check",
        step_sections.agreement,
    ),  # fmt: skip
    "optimizer": Section("Optimizer", "optimizer", "python -m benchmarks.optimizer", sections.optimizer),
    "inference": Section(
        "Sampling: the network, the decoder, and both",
        "inference",
        "python -m benchmarks.inference",
        sections.inference,
    ),  # fmt: skip
    "accounting": Section(
        "What a step has to do (counted)",
        "accounting",
        "python -m benchmarks.accounting --preset imagenet-b4 --batch 256 --json FILE",
        sections.accounting,
    ),  # fmt: skip
    "projection": Section(
        "GPU-hours of the recipes (projection)",
        "projection",
        "python -m benchmarks.projection ROWS",
        sections.projection,
    ),  # fmt: skip
}


def environment(rows: list[dict]) -> str:
    """Every machine with its versions, and the rows that it made."""
    lines = []
    for group in by_machine(rows):
        row, kinds = group[0], Counter(r["kind"] for r in group)
        dates = sorted(str(r["date"])[:19] for r in group if r.get("date")) or [NONE]
        lines.append(
            [device_name(row), row.get("driver") or NONE, clock_words(group) if row.get("gpu") else NONE]
            + [row.get("torch") or NONE, row.get("triton") or NONE, row.get("commit") or "unknown"]
            + [" to ".join(dict.fromkeys((dates[0], dates[-1])))]
            + [", ".join(f"{count} {kind}" for kind, count in kinds.items())]
        )
    header = "=hardware =driver =clocks =torch =triton =commit =date =rows".split()
    return grid(header, lines, "") + notes(missing(rows))


def parts(rows: list[dict]) -> str:
    """The parts that the suite ran, and the end of the log of each that failed."""
    latest = list({(r["part"], r.get("device"), r.get("gpu"), r.get("commit")): r for r in rows}.values())
    lines = [
        [r["part"], r["outcome"], number(r["seconds"], 3), str(r.get("rows", NONE)), r.get("log") or NONE]
        + [device_name(r), str(r.get("commit") or "unknown")[:12], str(r.get("date"))[:10]]
        for r in latest
    ]
    text = grid("=part =outcome seconds rows =log =hardware =commit =date".split(), lines, "")
    for row in latest:
        if row["outcome"] != "passed":
            head = f"{row['part']}: {row['outcome']}"
            tail = html.escape("\n".join(row.get("tail") or []))
            text += f'<p class="failed">{html.escape(head)}</p><pre>{tail}</pre>'
    return text


def ignored(rows: Rows) -> list[str]:
    """A line for each group of rows that no section shows."""
    words = [f"{rows.unknown} rows are of an unknown kind and are not shown."] if rows.unknown else []
    return words + rows.incomplete


def write(rows: Rows, out: Path) -> Path:
    """Write the report and its figures; returns the path of the HTML file."""
    out.mkdir(parents=True, exist_ok=True)
    page, body, links, lacking = Page(out), [], [], []
    for name, section in SECTIONS.items():
        found = [row for row in rows.by_kind[section.kind] if section.wanted(row)]
        if not found:
            lacking += [f"<p>{section.title}: made by <code>{section.command}</code></p>"] if section.command else []
            continue
        found = [row for row in rows.by_kind[section.kind] if section.wanted(row) or section.beside(row)]
        body.append(f'<section id="{name}"><h2>{section.title}</h2>{section.write(page, found)}</section>')
        links.append(f'<a href="#{name}">{section.title}</a>')
    if lacking:
        body.append(f'<section id="lacking"><h2>No rows</h2>{"".join(lacking)}</section>')
    if rows.by_kind["part"]:
        body.append(f'<section id="parts"><h2>Parts of the suite</h2>{parts(rows.by_kind["part"])}</section>')
    left = notes(ignored(rows))
    measured = [row for row in rows.shown if row["kind"] != "part"]
    body.append(f'<section id="environment"><h2>Environment</h2>{environment(measured)}{left}</section>')
    lead = f"Rows: {len(measured)}; combinations of hardware, versions and commit: {len(by_machine(measured))}."
    lead += " Times are medians; whiskers and ranges are 20 to 80 % quantiles. GiB are 1024^3 bytes, GB 10^9."
    text = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>MeanFlow benchmarks</title><style>{CSS}</style></head><body>
<h1>MeanFlow benchmarks</h1><p>{lead}</p><nav>{"".join(links)}<a href="#environment">Environment</a></nav>
{"".join(body)}
</body></html>
"""
    path = out / "report.html"
    path.write_text(text)
    return path


def main(args: list[str] | None = None) -> int:
    """Write the report; 2 where the rows cannot be read."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS", help="files of JSON lines, or folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report and its figures")
    options = parser.parse_args(args)
    try:
        rows = read(options.rows)
    except UserError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    path = write(rows, options.out)
    print("\n".join([f"{path}: {len(rows.shown)} rows", *ignored(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
