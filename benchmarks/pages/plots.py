"""The report's pictures. Each carries its hardware, so that it can stand alone."""

import io
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE = {
    # matplotlib brings it along; ``save`` names stand-ins for browsers without it
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    # text stays text: it can be searched, and the file stays small
    "svg.fonttype": "none",
    "svg.hashsalt": "meanflow",
}
WIDTH = 6.4
"""Inches; a narrow window shows it at half of that."""
OURS = ["#0072b2", "#56a5d8", "#9ccbe8", "#003f66", "#3d6b8c"]
OTHERS = ["#999999", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#8c6d31", "#5254a3", "#b3b300", "#4d4d4d", "#7fbf9f"]
NAMED = {"naive": OTHERS[0], "naive-compiled": OTHERS[1], "ours": OURS[0], "ours-captured": OURS[3]}
"""The variants of most pictures, each in one colour."""
DARK = {"#0072b2", "#003f66", "#3d6b8c", "#009e73", "#8c6d31", "#5254a3", "#4d4d4d"}
"""Colours on which words are white."""
INK, FAINT = "#222222", "#767676"


def colours(names: list[str]) -> dict[str, str]:
    """A colour a name: ours are blue."""
    found = {name: NAMED[name] for name in names if name in NAMED}
    for name in dict.fromkeys(names):
        palette = OURS if name.startswith(("ours", "native")) else OTHERS
        free = [shade for shade in palette if shade not in found.values()]
        found.setdefault(name, free[0] if free else palette[len(found) % len(palette)])
    return found


def two_colours(names: Iterable[str]) -> dict[str, str]:
    """Ours blue, all others grey."""
    return {name: OURS[0] if name.startswith("ours") else OTHERS[0] for name in names}


def new(
    height: float, hardware: str, panels: int = 1, names: int = 0, heights: tuple[float, ...] = ()
) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, or one above the other where their relative ``heights`` are given; ``height``
    inches without what stands below: a legend of ``names`` names in three columns, and the lines that name the
    hardware."""
    lines = textwrap.wrap(hardware, 118)
    foot = 0.06 + 0.12 * len(lines)
    legend = 0.06 + 0.175 * -(-names // 3) if names else 0
    height += foot + legend
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    below = (foot + legend) / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    figure.text(0.01, 0.02 / height, "\n".join(lines), fontsize=7, color=FAINT, va="bottom")
    if heights:
        return figure, list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def finish(figure: Figure, title: str) -> Figure:
    """The title above, and the legend of the first panel in the room that was left for it."""
    figure.suptitle("\n".join(textwrap.wrap(title, 88)), x=0.01, ha="left", fontsize=9.5, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        top = figure.get_layout_engine().get()["rect"][1]
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0, top), ncols=3, fontsize=8, borderaxespad=0.1
        )
    return figure


def bars(
    title: str, hardware: str, unit: str, values: dict[str, tuple], words: dict[str, str], known: dict | None = None
) -> Figure:
    """A bar a name with whiskers: ``values`` are (value, low, high), or (value,) without whiskers; ``known`` are the
    names' colours."""
    return panels_of_bars(title, hardware, unit, {"": (values, words)}, known)


def panels_of_bars(
    title: str, hardware: str, unit: str, panels: dict[str, tuple[dict, dict]], known: dict[str, str] | None = None
) -> Figure:
    """``bars`` one above the other: the (values, words) of each, by what stands above it."""
    with rc_context(STYLE):
        labels = {name: "\n".join(textwrap.wrap(name, 40)) for values, _ in panels.values() for name in values}
        bar = 0.16 + 0.14 * max(1 + label.count("\n") for label in labels.values())
        heights = tuple(bar * len(values) for values, _ in panels.values())
        figure, axes = new(0.3 + 0.7 * len(panels) + sum(heights), hardware, heights=heights)
        known = known or colours(list(labels))
        # inches that the names leave to the bars
        width = WIDTH - 0.3 - 0.075 * max(len(line) for label in labels.values() for line in label.split("\n"))
        for ax, (above, (values, words)) in zip(axes, panels.items(), strict=True):
            right = 0.0
            for y, (name, (value, *spread)) in enumerate(values.items()):
                ax.barh(y, value, color=known[name], height=0.7)
                if spread:
                    ax.plot(spread, (y, y), color=INK, linewidth=1.2, marker="|", markersize=7)
                end, beside = max(value, *spread, 0), {"textcoords": "offset points", "va": "center", "fontsize": 8}
                ax.annotate(words[name], (end, y), (5, 0), color=INK, **beside)
                right = max(right, end / (1 - min(0.8, (0.15 + 0.062 * len(words[name])) / width)))
            ax.set_yticks(range(len(values)), [labels[name] for name in values])
            ax.set_ylim(len(values) - 0.5, -0.5)
            ax.set_xlim(0, right)
            ax.set_title(above)
        axes[-1].set_xlabel(unit)
        return finish(figure, title)


def stacked(title: str, hardware: str, unit: str, rows: dict[str, dict[str, float]]) -> Figure:
    """A bar a name, cut into its segments; a segment that was measured below zero has no width."""
    with rc_context(STYLE):
        segments = list(dict.fromkeys(segment for row in rows.values() for segment in row))
        figure, (ax,) = new(1.0 + 0.32 * len(rows), hardware, names=len(segments))
        colour, most = colours(segments), max(sum(row.values()) for row in rows.values())
        left = np.zeros(len(rows))
        for segment in segments:
            width = np.array([max(0.0, row.get(segment, 0.0)) for row in rows.values()])
            ax.barh(
                range(len(rows)), width, left=left, color=colour[segment], label=segment, height=0.66, edgecolor="white"
            )
            for y, (start, value) in enumerate(zip(left, width, strict=True)):
                if value > 0.07 * most:
                    shade = "white" if colour[segment] in DARK else INK
                    words = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                    ax.text(start + value / 2, y, words, ha="center", va="center", fontsize=7, color=shade)
            left += width
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel(unit)
        return finish(figure, title)


def roofline(
    title: str, hardware: str, points: dict[str, list[tuple]], copy: float | None, gemm: float | None, peak
) -> Figure:
    """TFLOP/s against FLOP/byte, log-log.

    Args:
        points: a name's (FLOP/byte, TFLOP/s, operator); operators differ in their marks.
        copy, gemm: measured GB/s and TFLOP/s. peak: of the datasheet, or None.
    """
    with rc_context(STYLE):
        every = [point for found in points.values() for point in found]
        marks = dict(zip(dict.fromkeys(op for *_, op in every), "os^Dv", strict=False))
        figure, (ax,) = new(3.9, hardware, names=len(points) + len(marks) + 2)
        low, high = min(x for x, *_ in every) / 3, max(x for x, *_ in every) * 3
        xs = np.geomspace(low, high, 200)
        if copy is not None and gemm is not None:
            ax.plot(xs, np.minimum(xs * copy / 1e3, gemm), color=INK, linewidth=1.5, label="measured copy and product")
        elif gemm is not None:
            ax.axhline(gemm, color=INK, linewidth=1.5, label="measured product")
        if peak is not None:
            sheet = np.minimum(xs * peak.gbps / 1e3, peak.tflops)
            ax.plot(xs, sheet, color=FAINT, linewidth=1, linestyle="--", label="datasheet")
        colour = colours(list(points))
        for op, mark in marks.items():
            ax.scatter([], [], color=FAINT, marker=mark, s=26, label=op)
        for name, found in points.items():
            ax.scatter([], [], color=colour[name], marker="o", s=26, label=name)
            for x, y, op in found:
                ax.scatter(x, y, color=colour[name], s=30, marker=marks[op], edgecolor="white", linewidth=0.5, zorder=3)
        ax.set(
            xscale="log", yscale="log", xlabel="FLOP a byte of compulsory traffic", ylabel="TFLOP/s", xlim=(low, high)
        )
        for axis in ("x", "y"):
            plain_ticks(ax, axis)
        ax.grid(alpha=0.25, which="major")
        return finish(figure, title)


def dots(title: str, hardware: str, unit: str, rows: dict[str, dict[str, float]], line: float | None) -> Figure:
    """A line a name, with a dot for each variant; ``line`` is the measured ceiling."""
    with rc_context(STYLE):
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        figure, (ax,) = new(1.0 + 0.26 * len(rows), hardware, names=len(names) + 1)
        colour = colours(names)
        for name in names:
            found = [(row[name], y) for y, row in enumerate(rows.values()) if name in row]
            ax.scatter(*zip(*found, strict=True), color=colour[name], s=30, label=name, edgecolor="white", zorder=3)
        if line is not None:
            ax.axvline(line, color=INK, linewidth=1.2, label="measured copy")
        ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_xscale("log")
        plain_ticks(ax, "x")
        ax.grid(alpha=0.25)
        ax.set_xlabel(unit)
        return finish(figure, title)


def curves(title: str, hardware: str, axis: str, panels: dict[str, dict[str, list[tuple]]]) -> Figure:
    """A panel a quantity, a line a name: points are (x, value) or (x, value, low, high); words on x stay in order."""
    with rc_context(STYLE):
        names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
        figure, axes = new(3.2, hardware, len(panels), names=len(names))
        xs = list(dict.fromkeys(point[0] for lines in panels.values() for found in lines.values() for point in found))
        words = any(isinstance(x, str) for x in xs)
        colour = colours(names)
        for ax, (quantity, lines) in zip(axes, panels.items(), strict=True):
            for name, found in lines.items():
                at = [xs.index(p[0]) if words else p[0] for p in found]
                ax.plot(at, [p[1] for p in found], color=colour[name], marker="o", markersize=4, label=name)
                if all(len(p) == 4 for p in found):
                    low, high = [p[2] for p in found], [p[3] for p in found]
                    ax.fill_between(at, low, high, color=colour[name], alpha=0.2, linewidth=0)
            ax.set(xlabel=axis, ylabel=quantity, yscale="log")
            if words:
                ax.set_xticks(range(len(xs)), xs)
            else:
                ax.set_xscale("log", base=2)
                ax.set_xticks(sorted(xs), [f"{x:,}" for x in sorted(xs)], rotation=30 if len(xs) > 5 else 0)
                ax.minorticks_off()
            plain_ticks(ax, "y")
            ax.grid(alpha=0.25, which="both")
        return finish(figure, title)


def plain_ticks(ax: Axes, axis: str) -> None:
    """Numbers as they are said, not powers of ten, on a logarithmic axis, "x" or "y"."""
    low, high = getattr(ax, f"get_{axis}lim")()
    # as few as the range allows, but two at least
    fine = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    for digits in ((1,), (1, 2, 5), fine, [n / 10 for n in range(10, 100)]):
        ticks = [m * 10.0**e for e in range(-6, 9) for m in digits if low <= m * 10.0**e <= high]
        if len(ticks) >= 3:
            break
    if 2 <= len(ticks) <= 20:
        set_ticks = getattr(ax, f"set_{axis}ticks")
        set_ticks(ticks, [f"{t:,.0f}" if t >= 1000 else f"{t:g}" for t in ticks])
        set_ticks([], minor=True)
        getattr(ax, f"set_{axis}lim")(low, high)


def save(figure: Figure, stem: Path, label: str) -> str:
    """Write ``stem``.png and ``stem``.svg; returns the SVG as an element for an HTML page, named ``label``."""
    figure.savefig(stem.with_suffix(".png"), dpi=160, facecolor="white")
    text = io.StringIO()
    with rc_context(STYLE):
        # no date and no creator: the same rows make the same file, without a foreign address in it
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=metadata, facecolor="white")
    written = text.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    stem.with_suffix(".svg").write_text(written)
    head, rest = written[written.index("<svg") :].split(">", 1)
    # the size is the window's, and names of groups would meet those of the page's other figures
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return head + f' role="img" aria-label="{label}">' + re.sub(r'<g id="[^"]*"', "<g", rest)
