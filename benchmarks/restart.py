"""How long a compiled run waits for its first step, and what a step then takes: as one graph, or a graph a block.

python -m benchmarks.restart --depth 4

Digits on this CPU. Every start is a process of its own. Each way starts with an empty cache of compiled code, then with
what it left there, in turns. Inductor's own cache serves all, AOTAutograd's keeps the graphs that Inductor is given.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from meanflow.presets import preset

from .harness.arguments import positive
from .harness.environment import cpu_name
from .harness.table import table

START = """
import sys
from benchmarks.restart import first_step
print(*first_step(int(sys.argv[1]), sys.argv[2] == "True"))
"""
STEPS = 20


class Way(NamedTuple):
    """How a run is compiled."""

    blocks: bool
    """A graph a block, as FSDP2 needs them, the rest eagerly; else the whole target as one."""
    kept: bool
    """Whether AOTAutograd's cache is on."""


WAYS = {
    "one graph": Way(blocks=False, kept=True),
    "one graph, without AOTAutograd's cache": Way(blocks=False, kept=False),
    "a graph a block": Way(blocks=True, kept=True),
}
COLUMNS = ("seconds", "of the processor", "ms a step")


def first_step(depth: int, blocks: bool) -> tuple[float, float, float]:
    """What the first step of a digits run takes, which compiles it: seconds, and those of the processor; and the
    processor's milliseconds for a later one.
    """
    from meanflow.training.parallel import compile_blocks
    from meanflow.training.trainer import Trainer

    config = preset("digits")
    train = replace(config.train, compile=not blocks, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, train=train, model=replace(config.model, depth=depth)), Path(folder))
        if blocks:
            compile_blocks(trainer.net)
        wall, cpu = _step(trainer, 0)
        later = [_step(trainer, step)[1] for step in range(1, STEPS)]
        return wall, cpu, 1e3 * statistics.median(later)


def _step(trainer, step: int) -> tuple[float, float]:
    inputs, wall, cpu = trainer.inputs(step), time.perf_counter(), time.process_time()
    trainer.train_step(inputs)
    return time.perf_counter() - wall, time.process_time() - cpu


def started(depth: int, cache: str, way: Way) -> tuple[float, ...]:
    """:func:`first_step` of a process with this cache."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_AUTOGRAD_CACHE": str(int(way.kept))}
    command = [sys.executable, "-c", START, str(depth), str(way.blocks)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, done.stdout.splitlines()[-1].split()))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.restart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--depth", type=positive, default=preset("digits").model.depth, help="blocks (default 4)")
    parser.add_argument("--turns", type=positive, default=3, help="of starts with filled caches (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    with contextlib.ExitStack() as stack:
        caches = {name: stack.enter_context(tempfile.TemporaryDirectory()) for name in WAYS}
        cold = {name: started(options.depth, caches[name], way) for name, way in WAYS.items()}
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in WAYS}
        for turn in range(options.turns):
            for name in list(WAYS)[:: 1 if turn % 2 else -1]:
                found[name].append(started(options.depth, caches[name], WAYS[name]))
    first = next(iter(WAYS))
    ratios = {name: _ratios(each, found[first]) for name, each in found.items()}
    if options.json:
        print(json.dumps({"kind": "restart", "depth": options.depth, "cold": cold, "starts": found, "ratios": ratios}))
        return
    lines = []
    for name in WAYS:
        again = [statistics.median(column) for column in zip(*found[name], strict=True)]
        lines.append([name, "empty", *(f"{x:.1f}" for x in cold[name]), ""])
        lines.append([name, "filled", *(f"{x:.1f}" for x in again), " ".join(f"{x:.2f}" for x in ratios[name])])
    print(table(["compiled as", "caches", *COLUMNS, f"over {first}"], lines))
    print(f"digits, {options.depth} blocks, medians of {options.turns} turns; {os.cpu_count()} cores, {cpu_name()}")


def _ratios(starts: list[tuple[float, ...]], others: list[tuple[float, ...]]) -> list[float]:
    """The median over the turns of each figure's ratio."""
    columns = zip(zip(*starts, strict=True), zip(*others, strict=True), strict=True)
    return [statistics.median(a / b for a, b in zip(*both, strict=True)) for both in columns]


if __name__ == "__main__":
    main()
