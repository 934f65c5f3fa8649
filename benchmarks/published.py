"""Make what is shown of the committed rows anew: ``python -m benchmarks.published``.

Every folder of benchmarks/results with rows gets its report.html and, where it has the steps of HEADLINE, step.png. The
tables between the marks of a block are written again: the headline figures in README.md, what the recipes ask in
meanflow/README.md, their steps on several GPUs in benchmarks/README.md. Nothing is measured. ``--check`` writes
nothing: exit code 1 where a file differs from the rows.
"""

import argparse
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from . import projection, recipes, report
from .harness.rows import hardware, machine, newest, read, short_commit
from .harness.table import markdown_table
from .pages import plots
from .pages.markup import NONE, gib, number
from .pages.ratios import MARK, STEP, speed, uncompared, uncompared_note
from .pages.step_sections import ordered, other_programs, timed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = 120
"""Of a line of prose; a table's lines are as long as they are."""

GUIDED = {"omega": 1.0, "kappa": 0.5, "interval": [0.0, 1.0], "share": 0.25}
HEADLINE = {
    "cuda": [
        {"model": "XL/2", "batch": 32, "tokens": 256, "precision": "bf16"} | GUIDED,
        {"model": "B/4", "batch": 256, "tokens": 64, "precision": "bf16"} | GUIDED,
    ],
    "cpu": [{"model": "S/4", "batch": 32, "tokens": 64, "precision": "fp32"} | GUIDED],
}
"""The steps that stand for all, by device."""
NAMES = {
    "naive": "eager `torch.func.jvp`, whole batch (`naive`)",
    "naive-compiled": "the same under `torch.compile` (`naive-compiled`)",
    "ours": "ours, compiled (`ours`)",
    "ours-captured": "ours, compiled and captured (`ours-captured`)",
}
"""The variants of the table, in words."""


def of_step(steps: list[dict], wanted: dict) -> list[dict]:
    """The newest row with a time of each variant of a step."""
    found = [row for row in timed(steps) if all(row.get(name) == wanted.get(name) for name in STEP)]
    found = [row for row in found if row.get("peer") or row["variant"] in NAMES]
    return ordered(newest(found, lambda row: row["variant"])[0])


def line(variant: str, row: dict | None, steps: list[dict], newest_commit: str) -> list[str]:
    """A variant's line of the table; an older commit than most is named."""
    if row is None:
        return [NAMES[variant], "not measured", *[NONE] * 3]
    name = NAMES.get(variant) or f"{variant} {row.get('peer_commit') or ''}"
    if not row.get("peer") and row["commit"] != newest_commit:
        name += f", at {short_commit(row)}"
    cells = [number(row["ms"]), number(row["images_per_second"]), number(gib(row), 3)]
    mfu = f"{row['mfu']:.1%}" if row.get("mfu") else NONE
    return [f"{name} {MARK}" if uncompared(row, steps) else name, *cells, mfu]


def headline(steps: list[dict]) -> str:
    """The table of a card's headline steps, with what has to be said beside it, in Markdown."""
    lines, words, shown = [], [], [row for wanted in HEADLINE["cuda"] for row in of_step(steps, wanted)]
    last = max(shown, key=lambda row: row["date"])["commit"]
    for wanted in HEADLINE["cuda"]:
        found = of_step(steps, wanted)
        lines.append([f"**{wanted['model']}, batch {wanted['batch']}**", *[""] * 4])
        of_variant = {row["variant"]: row for row in found}
        for variant in [row["variant"] for row in found if row.get("peer")] + list(NAMES):
            lines.append(line(variant, of_variant.get(variant), steps, last))
        words.append(speeds(wanted["model"], found, steps))
    table = markdown_table(["training step", "ms", "images/s", "peak, GiB", "MFU"], lines)
    said = [derivative(steps), *uncompared_note(shown, steps), *other_programs(shown)]
    below = "\n".join(wrapped(f"- {line}", "  ") for line in [*words, *said] if line)
    return f"{wrapped(machines(shown) + ':')}\n\n{table}\n\n{below}"


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines of at most COLUMNS; those after the first are indented. No word is cut."""
    return textwrap.fill(text, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def machines(rows: list[dict]) -> str:
    """Hardware, versions and commits of rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(machine(row | {"commit": None}), []).append(row)
    return "; ".join(map(hardware, groups.values()))


def speeds(model: str, rows: list[dict], steps: list[dict]) -> str:
    """How many times as fast our fastest step is as each of the others, which came before it."""
    ours = min((row for row in rows if row["variant"].startswith("ours")), key=lambda row: row["ms"], default=None)
    if ours is None:
        return ""
    words = []
    for row in rows:
        if not row["variant"].startswith("ours"):
            # pairs of steps where one run made both
            found = speed(ours, row["variant"], rows)
            unsure = f" {MARK}" if uncompared(row, steps) or uncompared(ours, steps) else ""
            words.append(f"{found[0]:.2f}{unsure} times as fast as {row['variant']}")
    return f"{model}: {ours['variant']} is {', '.join(words)}." if words else ""


def derivative(steps: list[dict]) -> str:
    """A sentence: how much du/dt of a quarter of the samples adds to XL/2's step without guidance."""
    with_it, without = (
        of_step(steps, HEADLINE["cuda"][0] | {"kappa": 0.0, "share": share}) for share in (GUIDED["share"], 0.0)
    )
    for row in with_it:
        for other in without:
            if row["variant"] == other["variant"] == "ours-captured" and row["commit"] == other["commit"]:
                unsure = f" {MARK}" if uncompared(row, steps) or uncompared(other, steps) else ""
                added = f"{row['ms'] / other['ms'] - 1:.1%}{unsure}"
                return (
                    f"XL/2 without guidance, ours-captured: the derivative of {GUIDED['share']:.0%} of the samples "
                    f"adds {added} to a step ({row['ms']:.1f} ms against {other['ms']:.1f})."
                )
    return ""


def picture(steps: list[dict], device: str, stem: Path) -> None:
    """The headline steps as bars."""
    panels, shown = {}, []
    for wanted in HEADLINE[device]:
        if found := of_step(steps, wanted):
            memory = {row["variant"]: f", {number(gib(row), 3)} GiB" if gib(row) else "" for row in found}
            words = {row["variant"]: f"{number(row['ms'])} ms{memory[row['variant']]}" for row in found}
            values = {row["variant"]: (row["ms"], row["ms_20"], row["ms_80"]) for row in found}
            panels[f"{wanted['model']}, batch {wanted['batch']}, {wanted['precision']}"] = values, words
            shown += found
    title = "A training step, guided (kappa 0.5), r != t for 25%; optimizer and average included"
    figure = plots.panels_of_bars(title, machines(shown), "ms a step (20 to 80 %)", panels)
    plots.save(figure, stem, "training step")


def folders() -> list[Path]:
    """The results with rows."""
    return sorted({path.parent for path in RESULTS.glob("*/*.jsonl")})


def blocks() -> dict[str, dict[str, str]]:
    """The blocks written from the rows, by file and name."""
    steps = {folder: read([folder]).by_kind["step"] for folder in folders()}
    tables = [
        f"{headline(found)}\n\n![Training steps]({folder.relative_to(ROOT)}/step.png)"
        for folder, found in steps.items()
        if any(row.get("gpu") and of_step(found, wanted) for row in found for wanted in HEADLINE["cuda"])
    ]
    found = [row for rows in steps.values() for row in rows]
    projected = recipes.measured(found)
    demands = [recipes.demands(name, gpus=8, mfu=0.4) for name in recipes.RECIPES]
    scaled, _ = projection.scale(projection.usable(found), [8], list(projection.CARDS.values()))
    hours = wrapped(projection.sentence(scaled, "imagenet-xl2", "H200"))
    return {
        "README.md": {"headline": "\n\n".join([*tables, hours])},
        "benchmarks/README.md": {"several GPUs": projection.markdown(scaled)},
        "meanflow/README.md": {"recipes": recipes.markdown(demands, projected)},
    }


def filled(text: str, found: dict[str, str]) -> str:
    """A Markdown text with its blocks written anew.

    Raises:
        ValueError: a block is not there, or is not closed.
    """
    for name, words in found.items():
        begin, end = f"<!-- {name}: python -m benchmarks.published -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README: got no block {name!r}, wanted the lines {begin} and {end}; put them there")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{words}\n\n{end}{rest.partition(end)[2]}"
    return text


def make(folder: Path) -> None:
    """The report and the picture of a folder."""
    rows = read([folder])
    for row in rows.by_kind["breakdown"]:
        if not (folder / row.get("trace", "")).is_file():  # traces are too large to keep
            row.pop("trace", None)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(report.write(rows, Path(scratch)), folder / "report.html")
        steps = rows.by_kind["step"]
        device = next((row["device"] for row in steps), None)
        if device and any(of_step(steps, wanted) for wanted in HEADLINE[device]):
            picture(steps, device, Path(scratch) / "headline")
            shutil.copy(Path(scratch) / "headline.png", folder / "step.png")


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.published", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    options = parser.parse_args(args)
    found = {ROOT / name: words for name, words in blocks().items()}
    texts = {path: path.read_text() for path in found}
    wanted = {path: filled(text, found[path]) for path, text in texts.items()}
    if options.check:
        differing = [str(path.relative_to(ROOT)) for path in found if texts[path] != wanted[path]]
        for path in differing:
            print(f"{path} differs from the rows")
        return int(bool(differing))
    for path, text in wanted.items():
        path.write_text(text)
    for folder in folders():
        make(folder)
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
