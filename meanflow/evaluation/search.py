"""The search for the guidance that a network samples best with: no weight changes, only what it is told."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from ..config import RunConfig
from ..errors import UserError, require
from ..method.guidance import TOLD, sampling_guidance
from ..storage.record import write_atomically
from ..world import World

Score = Callable[[tuple[float, ...]], dict[str, float]]


def grid(omegas: Sequence[float], intervals: Sequence[str], config: RunConfig) -> list[tuple[float, ...]]:
    """The points to score: what the network is told at each.

    Args:
        intervals: START-END each.

    Raises:
        UserError: for a network that is told nothing, and for numbers that it cannot be told.
    """
    told = config.objective.guidance_input
    hint = "train one by scripts/train.py imf-b2, or digits-imf"
    require(told != "none", "checkpoint", TOLD[told][1], "a network that is told its guidance", hint)
    ends = [_interval(word) for word in intervals] if told == "interval" else [()]
    points = dict.fromkeys((omega, *interval) for interval in ends for omega in omegas)
    require(bool(points), "omegas and intervals", (), "one of each or more", "name some")
    return [sampling_guidance(config.model, config.objective, point, "omegas and intervals") for point in points]


def _interval(word: str) -> tuple[float, float]:
    try:
        start, end = map(float, word.split("-"))
    except ValueError:
        raise UserError(f"intervals: got {word!r}, wanted START-END, for instance 0.4-0.65; correct it") from None
    return start, end


def sweep(points: list[tuple[float, ...]], score: Score, path: Path, world: World) -> list[dict]:
    """Score the points that a file has no row of yet, and write each row as it comes; all rows, the file's first.

    A collective call.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {tuple(row["guidance"]) for row in rows}
    bar = tqdm(points, "sweep", unit="point", disable=not world.is_main, dynamic_ncols=True)
    for point in bar:
        if point in done:
            continue
        rows.append({"guidance": list(point), **score(point)})
        if world.is_main:
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        bar.set_postfix_str(in_words(best(rows)), refresh=False)
    return rows


def measure(row: dict) -> tuple[str, float]:
    """The score that decides, by name."""
    name = "fid" if "fid" in row else "frechet"
    return name, row[name]


def best(rows: list[dict]) -> dict:
    """The row of the lowest score."""
    return min(rows, key=lambda row: measure(row)[1])


def in_words(row: dict) -> str:
    """A point and its score."""
    name, value = measure(row)
    if not row["guidance"]:
        return f"{name} {value:.4g}"
    omega, *interval = row["guidance"]
    times = f" in [{interval[0]:g}, {interval[1]:g}]" if interval else ""
    return f"omega {omega:g}{times}: {name} {value:.4g}"
