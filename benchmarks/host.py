"""What a call of an operator takes of the host: microseconds until it is enqueued, on any machine, with a GPU or none.

python -m benchmarks.host
python -m benchmarks.host --base HEAD~1      beside the operators of another revision, or of a folder

Kernels are neither compiled nor run (`harness.launching`), so all of a call but the driver's own launch is timed. Each
tree has a process of its own; the processes take turns, and what is printed is the least of all turns: what else a
machine does only adds to a host's time. Operands are those of a DiT-S/2 in fp16, of 8 samples.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .harness.arguments import positive
from .harness.environment import cpu_name
from .harness.table import table
from .regression import ROOT, sides_of

SERVE = "from benchmarks.workloads.host_calls import serve; serve()"


class Side:
    """A process that times the operators of one tree by this one's benchmark."""

    def __init__(self, tree: Path):
        path = os.pathsep.join(filter(None, (str(tree / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", ""))))
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE], cwd=ROOT, env=inherited | {"PYTHONPATH": path},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.us: dict[str, float] = {}

    def turn(self) -> None:
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("benchmarks.host: error: an operator failed; its message is above")
        found = json.loads(line)
        self.us = {name: min(us, self.us.get(name, us)) for name, us in found.items()}


def measure(trees: list[Path], repeats: int) -> list[dict[str, float]]:
    """The least microseconds of each call with the operators of each tree."""
    sides: list[Side] = []
    try:
        sides += [Side(tree) for tree in trees]
        for turn in range(repeats):
            for side in sides if turn % 2 else reversed(sides):
                side.turn()
    finally:
        for side in sides:
            side.process.kill()
            side.process.wait()
    return [side.us for side in sides]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.host", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--base", default=None, help="the revision or the folder to compare with (default none)")
    parser.add_argument("--repeats", type=positive, default=5, help="turns of each tree (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    with sides_of(options.base) if options.base else contextlib.nullcontext() as base:
        here, *there = measure([ROOT, *([base] if base else [])], options.repeats)
    if options.json:
        print(json.dumps({"kind": "host", "us": here, "base": options.base, "base_us": there[0] if there else None}))
        return
    header = ["call", "us", *([f"{options.base}, us", "ratio"] if there else [])]
    lines = [[name, f"{us:.1f}", *(x for base in there for x in (f"{base[name]:.1f}", f"{base[name] / us:.1f}"))]
             for name, us in here.items()]  # fmt: skip
    print(table(header, lines))
    print(f"{cpu_name()}, torch {torch.__version__}: the least of {options.repeats} turns")


if __name__ == "__main__":
    main()
