"""Train digits with threads that wait as OpenMP has them, and as a command chooses at its start, in pairs on this CPU.

python -m benchmarks.waiting --spinning 4      beside four busy processes
python -m benchmarks.waiting                   on a machine that is to be at rest

Each run is a process of its own: OpenMP reads how to wait once. The two of a pair come one after the other, the first
of them in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from meanflow.errors import UserError, require
from meanflow.presets import preset
from meanflow.startup import others

from .harness.arguments import BadInput, finite, positive
from .harness.table import table

WARM_STEPS = 3
RATE = """
import os, sys
from benchmarks.waiting import rate
print(rate(float(sys.argv[1])), os.environ.get("OMP_WAIT_POLICY", "its own"))
"""
# it ends with this process, however that ends
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
WAYS = {"default": RATE, "chosen": "from meanflow.startup import choose_waiting; choose_waiting()" + RATE}
"""What a run's process does: it trains, or lets a command's start choose before."""


def rate(seconds: float) -> float:
    """Images a second that this process trains, measured for so long."""
    from meanflow.training.prefetch import Prefetcher
    from meanflow.training.trainer import Trainer

    config = preset("digits")
    never = 10**9
    train = replace(config.train, steps=never, log_every=never, sample_every=never, save_every=never, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, train=train), Path(folder))
        with Prefetcher(trainer.inputs, 0) as data:
            while trainer.step < WARM_STEPS:
                trainer.train_step(data.get(trainer.step))
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                trainer.train_step(data.get(trainer.step))
            return train.batch * (trainer.step - WARM_STEPS) / (time.perf_counter() - start)


@contextmanager
def spinning(count: int):
    """Within it so many other processes keep the cores busy."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def measure(way: str, seconds: float) -> tuple[float, str]:
    """The rate of a process, and how its threads waited."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", WAYS[way], str(seconds)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found, policy = done.stdout.strip().split(maxsplit=1)
    return float(found), policy


def pairs(count: int, seconds: float, busy: int) -> list[dict]:
    """Images a second of each way, and the policy that was chosen, of each pair."""
    found = []
    with spinning(busy):
        for i in range(count):
            measured = {way: measure(way, seconds) for way in list(WAYS)[:: 1 if i % 2 else -1]}
            found.append({way: rate for way, (rate, _) in measured.items()} | {"policy": measured["chosen"][1]})
            rates = ", ".join(f"{way} {rate:.0f} ({policy})" for way, (rate, policy) in measured.items())
            print(f"pair {i + 1} of {count}: {rates}", file=sys.stderr)
    return found


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.waiting", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--spinning", type=int, default=0, help="busy processes beside it (default 0)")
    parser.add_argument("--pairs", type=positive, default=5, help="of runs (default 5)")
    parser.add_argument("--seconds", type=finite, default=5.0, help="that a run is measured (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    options = parser.parse_args(args)
    try:
        require(0 < options.seconds < 600, "seconds", options.seconds, "a number in (0, 600)", "change it")
        require(0 <= options.spinning <= 64, "spinning", options.spinning, "a number from 0 to 64", "change it")
    except UserError as error:
        raise BadInput(f"benchmarks.waiting: error: {error}") from None
    before, found = others(), pairs(options.pairs, options.seconds, options.spinning)
    medians = {name: statistics.median(pair[name] for pair in found) for name in WAYS}
    ratio = statistics.median(pair["chosen"] / pair["default"] for pair in found)
    row = {"kind": "waiting", "cores": os.cpu_count(), "spinning": options.spinning, "others_before": before,
           "pairs": found, "medians": medians, "ratio": ratio}  # fmt: skip
    if options.json:
        print(json.dumps(row))
        return
    lines = [[str(i), *(f"{pair[way]:.0f}" for way in WAYS), pair["policy"], f"{pair['chosen'] / pair['default']:.2f}"]
             for i, pair in enumerate(found, 1)]  # fmt: skip
    lines.append(["median", *(f"{medians[way]:.0f}" for way in WAYS), "", f"{ratio:.2f}"])
    print(table(["pair", *(f"{way}, images/s" for way in WAYS), "policy chosen", "chosen over default"], lines))
    print(f"{os.cpu_count()} cores, {options.spinning} spinning processes, {before:.0f} others at work before")


if __name__ == "__main__":
    main()
