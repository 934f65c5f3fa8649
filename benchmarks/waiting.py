"""Train digits with threads that spin while they wait, and passively, in pairs on this CPU.

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

from .harness.arguments import BadInput, finite, positive
from .harness.table import table

WARM_STEPS = 3
RUN = "import sys; from benchmarks.waiting import rate; print(rate(float(sys.argv[1])))"
# it ends with this process, however that ends
SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
POLICIES = {"default": None, "passive": "PASSIVE"}
"""Values of OMP_WAIT_POLICY."""


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


def measure(policy: str | None, seconds: float) -> float:
    """The rate of a process whose OpenMP waits so; None leaves it to OpenMP."""
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    env = inherited | ({"OMP_WAIT_POLICY": policy} if policy else {})
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(seconds)], env=env, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def pairs(count: int, seconds: float, busy: int) -> list[dict[str, float]]:
    """Images a second by policy, of each pair."""
    found = []
    with spinning(busy):
        for i in range(count):
            order = list(POLICIES)[:: 1 if i % 2 else -1]
            found.append({name: measure(POLICIES[name], seconds) for name in order})
            rates = ", ".join(f"{name} {value:.0f}" for name, value in found[-1].items())
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
    load, found = os.getloadavg()[0], pairs(options.pairs, options.seconds, options.spinning)
    medians = {name: statistics.median(pair[name] for pair in found) for name in POLICIES}
    ratio = statistics.median(pair["passive"] / pair["default"] for pair in found)
    row = {"kind": "waiting", "cores": os.cpu_count(), "spinning": options.spinning, "load_before": load,
           "pairs": found, "medians": medians, "ratio": ratio}  # fmt: skip
    if options.json:
        print(json.dumps(row))
        return
    lines = [[str(i), *(f"{pair[name]:.0f}" for name in POLICIES), f"{pair['passive'] / pair['default']:.2f}"]
             for i, pair in enumerate(found, 1)]  # fmt: skip
    lines.append(["median", *(f"{medians[name]:.0f}" for name in POLICIES), f"{ratio:.2f}"])
    print(table(["pair", *(f"{name}, images/s" for name in POLICIES), "passive over default"], lines))
    print(f"{os.cpu_count()} cores, {options.spinning} spinning processes, load {load:.1f} before")


if __name__ == "__main__":
    main()
