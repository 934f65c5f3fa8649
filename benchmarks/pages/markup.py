"""The report's numbers, tables, notes, and the line that names the hardware."""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from ..harness.rows import hardware, objective_words
from . import plots

NONE = "–"
GIB = 2**30


@dataclass
class Page:
    """The report while it is written."""

    out: Path
    names: set[str] = field(default_factory=set)

    def figure(self, name: str, figure: Figure) -> str:
        """Write a figure's files and return it as HTML."""
        stem = base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        while stem in self.names:
            stem = f"{base}-{len(self.names)}"
        self.names.add(stem)
        return f"<figure>{plots.save(figure, self.out / stem, html.escape(name, quote=True))}</figure>"


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits, zeros at the end too; every digit in front of the point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def power(value: float | None) -> str:
    """Two digits and a power of ten."""
    return NONE if value is None else re.sub(r"e([+-])0", r"e\1", f"{value:.1e}")


def gib(row: dict) -> float | None:
    """A row's peak memory."""
    return row["peak_bytes"] / GIB if row.get("peak_bytes") else None


def spread(row: dict) -> str:
    return f"{number(row['ms_20'])} to {number(row['ms_80'])}"


def grid(header: list[str], lines: list[list[str]], caption: str) -> str:
    """A table; a column without "=" in front of its title is of numbers and stands right."""
    words = [title.startswith("=") for title in header]

    def line(cells: list[str], tag: str) -> str:
        # sentences may break, names and numbers not
        kinds = ("words long" if len(cell) > 40 else "words" for cell in cells)
        sides = (f' class="{kind}"' if left else "" for kind, left in zip(kinds, words, strict=True))
        return "".join(f"<{tag}{s}>{html.escape(c)}</{tag}>" for s, c in zip(sides, cells, strict=True))

    head = line([title.removeprefix("=") for title in header], "th")
    body = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in lines)
    note = f"<caption>{html.escape(caption)}</caption>"
    return f'<div class="scroll"><table>{note}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def notes(lines: list[str]) -> str:
    return "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines)


def where(rows: list[dict]) -> str:
    """The line above everything that was taken on one machine."""
    badge = '<span class="badge">CPU</span> no measure of a GPU: ' if rows[0].get("device") == "cpu" else ""
    return f'<p class="hardware">{badge}{html.escape(hardware(rows))}</p>'


def workload(row: dict, *without: str) -> str:
    """The workload of a step in words."""
    usual = (32 // int(row["model"].rpartition("/")[2])) ** 2
    words = {
        "model": row["model"],
        "batch": f"batch {row['batch']}",
        # those of 256x256 pixels are not worth the words
        "tokens": f"{row['tokens']:,} tokens" if row.get("tokens", usual) != usual else "",
        "precision": row.get("precision", ""),
        **objective_words(row),
    }
    return ", ".join(word for name, word in words.items() if word and name not in without)


def by_workload(rows: list[dict], *without: str) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(workload(row, *without), []).append(row)
    return groups


def older(count: int) -> list[str]:
    return [f"{count} older rows of the same names are not shown."] if count else []


def figures_of(figures: list[str]) -> str:
    """Side by side where the window is wide enough."""
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""
