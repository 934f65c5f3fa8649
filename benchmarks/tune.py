"""Time launch configs against the shipped ones, on this machine's GPU: ``python -m benchmarks.tune --seconds 120``.

    python -m benchmarks.tune --list                                    what would be swept, with no GPU
    python -m benchmarks.tune attention attention_jvp --rows tune.jsonl
    TRITON_INTERPRET=1 python -m benchmarks.tune --device cpu           tiny shapes: shows only that it runs

Candidates stand beside each operator's config, in candidates.py. A candidate is timed where its results are right: at
most twice as far from fp64 as plain torch's of the same dtype, plus the tests' floor. Then the configs of a kernel take
turns, each with a cold cache, and the gain is of pairs of one turn. A config that does not compile, spills, does not
run or is wrong becomes a row with its reason. The most valuable kernels come first; when the seconds are over the rest
is left out. At the end stand the tables' entries as they should read for this architecture: those that are faster than
the shipped ones by more than the noise, over all shapes that an entry serves.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from meanflow_kernels.launch import arch_of

from .harness import arbiter
from .harness.arguments import BadInput, finite
from .harness.clock import FLUSH, ColdCache, host_ms, quantiles, timed_ms, wall_ms
from .harness.environment import clocks, environment, merge
from .harness.errors import FLOOR, relative_error
from .pages.tuned_configs import line, summary
from .tuning.ahead import Ahead
from .tuning.subjects import Subject, subjects
from .tuning.trials import Trial, Unserved

ROUNDS, FEWEST = {"cuda": 40, "cpu": 1}, 5
"""Turns of the configs of a kernel, and those that are taken however long they last."""
SHARE = 0.1
"""Largest share of --seconds that the turns of one kernel may take."""


LOST = ("illegal", "misaligned", "launch failure", "assert triggered")
"""Words of those CUDA errors after which a process cannot use its GPU any more."""


class Refused(Exception):
    """Why a config is not timed."""


# --- correct first ---


class Bar:
    """The largest error that each of a trial's results may have."""

    def __init__(self, trial: Trial):
        self._exact = trial.plain(True)
        plain = [x.to(y.dtype) for x, y in zip(trial.plain(False), trial.outputs, strict=True)]
        self._bars = [
            2 * relative_error(x, exact) + FLOOR[x.dtype] for x, exact in zip(plain, self._exact, strict=True)
        ]

    def share(self, results: tuple[torch.Tensor, ...]) -> float:
        """The largest error in units of its bar.

        Raises:
            Refused: it is above 1.
        """
        errors = [relative_error(x, exact) for x, exact in zip(results, self._exact, strict=True)]
        for index, (error, bar) in enumerate(zip(errors, self._bars, strict=True)):
            if not error <= bar:
                raise Refused(f"wrong: result {index} is {error:.1e} off fp64, at most {bar:.1e} may be")
        return max(error / bar for error, bar in zip(errors, self._bars, strict=True))


def prepare(trial: Trial, subject: Subject, config: object) -> tuple[Callable, dict]:
    """The call of a config, and what the compiler says of its kernels.

    Raises:
        Refused: it spills.
    """
    if not subject.compiles(config):
        return lambda: trial.library(config), {}
    launches = tuple(trial.launches(config))
    kernels = [launch.run() for launch in launches]

    def call():
        for launch in launches:
            launch.run()
        return trial.outputs

    if kernels[0] is None:
        return call, {}
    columns = {
        "registers": [kernel.n_regs for kernel in kernels],
        "spills": [kernel.n_spills for kernel in kernels],
        "shared_bytes": [kernel.metadata.shared for kernel in kernels],
    }
    if any(columns["spills"]):
        raise Refused(f"spills: {columns['spills']}")
    return call, columns


def check(trial: Trial, bar: Bar, subject: Subject, config: object) -> tuple[Callable, dict]:
    """Run a config once and compare its results: the call and its columns.

    Raises:
        Refused: with the reason.
    """
    for x in trial.outputs:
        # an element that is not written fails
        x.fill_(math.nan)
    try:
        call, columns = prepare(trial, subject, config)
        results = call()
        return call, columns | {"error_of_bar": bar.share(results)}
    except Unserved as error:
        raise Refused(str(error)) from None
    except Refused:
        raise
    except Exception as error:
        if any(words in str(error) for words in LOST):
            raise
        words = (str(error).strip() or "no message").splitlines()[0][:200]
        raise Refused(f"does not run: {type(error).__name__}: {words}") from None


# --- then in turn ---


class Clock:
    """Milliseconds of one call; on a GPU with a cold L2 cache."""

    def __init__(self, device: str):
        self.device, self._cold = device, ColdCache() if device == "cuda" else None

    def lead(self, call: Callable) -> float:
        """Milliseconds that the host takes to enqueue a call; 0 on a CPU."""
        return host_ms(call, self.device, samples=3) if self._cold else 0.0

    def time(self, call: Callable, lead: float, before: Callable | None) -> float:
        return timed_ms(call, self._cold, lead, before) if self._cold else wall_ms(call, samples=1)[0]


def in_turn(
    calls: dict[str, Callable], clock: Clock, until: float, before: Callable | None = None
) -> dict[str, list[float]]:
    """Samples of each call, one a round; every other round backwards, so that nobody always follows the same one."""
    # what comes before a call is enqueued under the same flush
    extra = clock.lead(before) if before else 0.0
    leads = {name: clock.lead(call) + extra for name, call in calls.items()}
    samples = {name: [] for name in calls}
    for turn in range(ROUNDS[clock.device]):
        if turn >= FEWEST and arbiter.running_seconds() > until:
            break
        for name in list(calls) if turn % 2 else reversed(calls):
            samples[name].append(clock.time(calls[name], leads[name], before))
    return samples


def sweep(subject: Subject, index: int, ahead: Ahead | None, clock: Clock, seconds: float, until: float) -> list[dict]:
    """The rows of a subject: one a config; those that launch the same share a time."""
    torch.manual_seed(0)
    trial = subject.build(clock.device)
    bar, calls, rows = Bar(trial), {}, {}
    for number, config in enumerate(subject.configs):
        if number > 1 and arbiter.running_seconds() > until:
            break
        name = subject.label(config)
        rows[name] = identity(subject, config)
        try:
            if ahead and (why := ahead.why_not(index, number)):
                raise Refused(why)
            calls[name], columns = check(trial, bar, subject, config)
            rows[name] |= columns
        except Refused as error:
            rows[name] |= {"ms": None, "missing": {"ms": str(error)}}
    with arbiter.alone(clock.device):
        end = min(until, arbiter.running_seconds() + seconds)
        samples = in_turn(calls, clock, end, trial.before and trial.before.run)
    shipped = samples.get(subject.label(subject.shipped))
    for name, found in samples.items():
        rows[name] |= dict(zip(("ms_20", "ms", "ms_80"), quantiles(found), strict=True)) | {"samples": len(found)}
        if shipped:
            pairs = quantiles([a / b for a, b in zip(shipped, found, strict=True)])
            rows[name]["gain"] = dict(zip(("20", "50", "80"), pairs, strict=True))
    for config, first in subject.same.items():
        if config != first and (name := subject.label(first)) in rows:
            rows[subject.label(config)] = rows[name] | identity(subject, config) | {"same_as": name}
    return list(rows.values())


def identity(subject: Subject, config: object) -> dict:
    """The columns that say what was timed."""
    return {
        "kind": "tune",
        "op": subject.op,
        "shape": f"{subject.model} {subject.network_pass} {subject.shape}",
        "dtype": str(subject.half).removeprefix("torch."),
        "table": subject.table,
        "config": subject.label(config),
        "entry": subject.entry(config),
        "shipped": config == subject.shipped,
        **asdict(subject.shape),
    }


def run(chosen: dict[int, Subject], arch: int, device: str, seconds: float, keep: Callable[[list[dict]], None]) -> None:
    """Sweep the subjects until the seconds are over; ``keep`` gets each one's rows as soon as they are known."""
    until = arbiter.running_seconds() + seconds
    with Ahead(arch, device, chosen) if device == "cuda" else contextlib.nullcontext() as ahead:
        with arbiter.alone(device):
            clock = Clock(device)
        for done, (index, subject) in enumerate(chosen.items()):
            if arbiter.running_seconds() > until:
                print(f"the {seconds:.0f} s are over: {len(chosen) - done} kernels are left out", flush=True)
                break
            try:
                rows = sweep(subject, index, ahead, clock, SHARE * seconds, until)
            except torch.OutOfMemoryError:
                print(f"{subject.title}: out of memory", flush=True)
                continue
            print(line(rows), flush=True)
            keep([merge(row, clocks(device)) for row in rows])


def main(argv: list[str] | None = None) -> int:
    """Print what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="kernels to tune (default: all)")
    parser.add_argument("--seconds", type=finite, default=120.0, help="no kernel is begun after these (default: 120)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    parser.add_argument("--list", action="store_true", help="print what would be swept, and end")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--commit", help="what the rows say of the source, where it is no git checkout")
    arbiter.add_argument(parser)
    options = parser.parse_args(argv)
    arbiter.join(options.turns)
    device = options.device or ("cuda" if torch.cuda.is_available() or options.list else "cpu")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BadInput("--device: got cpu, which has no launch configs, wanted an NVIDIA GPU; --list shows them")
    arch = arch_of(torch.device("cuda")) if torch.cuda.is_available() else 90
    every = subjects(arch, device)
    known = list(dict.fromkeys(subject.op for subject in every))
    if unknown := set(options.ops) - set(known):
        parser.error(f"OP: got {min(unknown)}, wants some of {', '.join(known)}")
    chosen = {i: subject for i, subject in enumerate(every) if subject.op in (options.ops or known)}
    if options.list:
        for subject in chosen.values():
            print(f"{subject.title}, {subject.table}: {'; '.join(map(subject.label, subject.configs))}")
        return 0
    found = []
    where = {"flush": FLUSH if device == "cuda" else None} | environment(device, options.commit)

    def keep(rows: list[dict]) -> None:
        found.extend(merge(row, where) for row in rows)
        if options.rows:
            options.rows.parent.mkdir(parents=True, exist_ok=True)
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found[-len(rows) :])

    try:
        run(chosen, arch, device, options.seconds, keep)
    finally:
        # whatever ended it: what was found stands
        print(summary(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
