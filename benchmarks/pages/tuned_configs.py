"""Conclusions from the tuner's rows: the entries of the config tables that should change, and the report's section."""

import math

from ..harness.rows import by_machine, hardware, newest, why_untimed
from .markup import NONE, Page, grid, notes, number, older, spread, where


def entries(rows: list[dict]) -> list[dict]:
    """For each table's entry the config that gains most over all shapes it serves, where that is more than noise."""
    found = []
    for place in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == place]
        shapes = {(row["op"], row["shape"]) for row in mine}
        gains = {}
        for entry in dict.fromkeys(row["entry"] for row in mine if not row["shipped"]):
            timed = [row for row in mine if row["entry"] == entry and row.get("gain")]
            if {(row["op"], row["shape"]) for row in timed} == shapes:
                gains[entry] = {
                    q: math.exp(sum(math.log(r["gain"][q]) for r in timed) / len(timed)) for q in ("20", "50")
                }
                gains[entry]["least"] = min(row["gain"]["50"] for row in timed)
        best = max(gains, key=lambda entry: gains[entry]["50"], default=None)
        if best and gains[best]["20"] > 1:
            found.append({"table": place, "entry": best, "shapes": len(shapes), **gains[best]})
    return found


def line(rows: list[dict]) -> str:
    """The shipped and the fastest config of one kernel at one shape."""
    rows = [row for row in rows if "same_as" not in row]
    timed = [row for row in rows if row["ms"]]
    words = [f"{row['ms']:.4f} ms shipped ({row['config']})" for row in timed if row["shipped"]]
    best = min(timed, key=lambda row: row["ms"], default=None)
    if best and best["shipped"]:
        words.append("none is faster")
    elif best:
        gain = f", {best['gain']['50']:.3f} times as fast" if best.get("gain") else ""
        words.append(f"{best['ms']:.4f} ms best ({best['config']}{gain})")
    return f"{rows[0]['op']} {rows[0]['shape']}: {'; '.join([*words, f'{len(timed)} of {len(rows)} timed'])}"


def summary(rows: list[dict]) -> str:
    """The reasons why configs were not timed, and the entries that should change."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row["ms"]:
            reasons.setdefault(row["missing"]["ms"], []).append(f"{row['op']} {row['shape']} {row['config']}")
    lines = [f"not timed: {why}: {len(found)}, such as {found[0]}" for why, found in reasons.items()]
    lines += [
        "",
        "Entries that should read otherwise, and how many times as fast they are (20 %, median, least shape):",
    ]
    changes = [
        f"{x['table']}: {x['entry']}  # {x['20']:.3f}, {x['50']:.3f}, {x['least']:.3f} over {x['shapes']} shapes"
        for x in entries(rows)
    ]
    return "\n".join(lines + (changes or ["none"]))


def tuned(page: Page, rows: list[dict]) -> str:
    """The report's section: for each kernel and shape the shipped config and the fastest, and the entries to change."""
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (row["op"], row["shape"], row["dtype"], row["config"]))
        lines, reasons = [], {}
        for key in dict.fromkeys((row["op"], row["shape"]) for row in group):
            found = [row for row in group if (row["op"], row["shape"]) == key and "same_as" not in row]
            timed = sorted((row for row in found if row["ms"]), key=lambda row: row["ms"])
            for row in found:
                if why := why_untimed(row):
                    reasons.setdefault(why, []).append(f"{row['op']} {row['config']}")
            kept = [row for row in timed if row["shipped"] or row is timed[0]]
            lines += [
                [*key, row["config"], "shipped" if row["shipped"] else "", number(row["ms"]), spread(row)]
                + [number(row["gain"]["50"], 3) if row.get("gain") else NONE, f"{len(timed)} of {len(found)}"]
                for row in kept
            ]
        header = ["=kernel", "=shape", "=config", "=", "ms", "20 to 80 %, ms", "times as fast as shipped", "timed"]
        caption = "The shipped config and the fastest of those that took turns with it; ratios are of pairs of a turn."
        pieces.append(where(group) + grid(header, lines, f"{caption} {hardware(group)}"))
        words = [
            f"{x['table']} should read {x['entry']}: {number(x['50'], 3)} times as fast over {x['shapes']} shapes, "
            f"{number(x['least'], 3)} at the least."
            for x in entries(group)
        ]
        words += [f"Not timed: {why}: {', '.join(dict.fromkeys(names))}." for why, names in reasons.items()]
        pieces.append(notes(words + older(left_over)))
    return "".join(pieces)
