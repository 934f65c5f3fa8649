"""How long a compiled run waits for its first step: cold, and started again with and without AOTAutograd's cache.

python -m benchmarks.restart --depth 4

Digits on this CPU. Every start is a process of its own with a cache of compiled code that the first one fills; the two
ways to start again take turns. Inductor's own cache serves both, AOTAutograd's keeps the graphs that Inductor is given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from meanflow.presets import preset

from .harness.arguments import positive
from .harness.environment import cpu_name
from .harness.table import table

START = """
import sys
from benchmarks.restart import first_step
print(*first_step(int(sys.argv[1])))
"""
WAYS = {"filled": "1", "filled, without AOTAutograd's": "0"}
"""The caches of a start that is not the first, and the switch of AOTAutograd's."""


def first_step(depth: int) -> tuple[float, float]:
    """Seconds that compiling the step of a digits run takes, by the wall clock and of the processor."""
    from meanflow.training.trainer import Trainer

    config = preset("digits")
    train = replace(config.train, compile=True, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, train=train, model=replace(config.model, depth=depth)), Path(folder))
        inputs, start = trainer.inputs(0), time.process_time()
        trainer.train_step(inputs)
        return trainer.make_step.compile_seconds, time.process_time() - start


def started(depth: int, cache: str, switch: str) -> tuple[float, ...]:
    """:func:`first_step` of a process with these caches."""
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_AUTOGRAD_CACHE": switch}
    command = [sys.executable, "-c", START, str(depth)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(map(float, done.stdout.splitlines()[-1].split()))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.restart", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--depth", type=positive, default=preset("digits").model.depth, help="blocks (default 4)")
    parser.add_argument("--pairs", type=positive, default=3, help="of restarts (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as cache:
        cold = started(options.depth, cache, "1")
        for pair in range(options.pairs):
            for way in list(WAYS)[:: 1 if pair % 2 else -1]:
                found[way].append(started(options.depth, cache, WAYS[way]))
    medians = {way: [statistics.median(column) for column in zip(*each, strict=True)] for way, each in found.items()}
    both, alone = found.values()
    ratios = [statistics.median(a[i] / b[i] for a, b in zip(both, alone, strict=True)) for i in range(len(cold))]
    if options.json:
        print(json.dumps({"kind": "restart", "depth": options.depth, "cold": cold, "starts": found, "ratios": ratios}))
        return
    lines = [[name, *(f"{x:.1f}" for x in row)] for name, row in ({"empty": cold} | medians).items()]
    lines.append(["with AOTAutograd's, over without", *(f"{ratio:.2f}" for ratio in ratios)])
    print(table(["caches", "seconds", "of the processor"], lines))
    print(f"digits, {options.depth} blocks, medians of {options.pairs} pairs; {os.cpu_count()} cores, {cpu_name()}")


if __name__ == "__main__":
    main()
