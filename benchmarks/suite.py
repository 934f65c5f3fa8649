"""Everything that is measured, in parts, and one report: ``python -m benchmarks.suite --out DIR``.

python -m benchmarks.suite --out DIR                  the quick parts, as far as 9 minutes of a GPU go
python -m benchmarks.suite --out DIR --full           all of them, however long they take
python -m benchmarks.suite --out DIR --device cpu     small sizes, marked as CPU, within 5 minutes on 2 cores
python -m benchmarks.suite --list                     the parts: order, expected seconds, memory, commands

On a GPU the parts compile side by side, as far as cores and the GPU's memory go, and one at a time is timed, while all
others are stopped. Tests are parts too: where one fails, what it tests is not timed. Rows are on the disk the moment
they are known, and the same command again goes on: parts that passed at this commit, on this device and with these
arguments are not repeated, and those of which nothing is known come first. DIR/rows.jsonl holds the rows,
DIR/parts.jsonl how each part ended, DIR/logs/PART.log what it printed, DIR/report.html shows it all, DIR/*.trace.json
are traces for https://ui.perfetto.dev.
Exit code: 0 all parts passed, 1 a part failed or no time was left for it, 2 a wrong argument.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

from meanflow.errors import UserError
from meanflow.storage.record import write_atomically

from . import report
from .harness.arguments import finite
from .harness.environment import environment
from .harness.rows import kind_of, parse, read
from .harness.table import table
from .parts.catalogue import PARTS, Part, chosen, rehearsed
from .parts.processes import Process
from .parts.schedule import PASSED, SKIPPED, Ended, Schedule

ROOT = Path(__file__).parents[1]
BUDGET = {"cuda": 540, "cpu": 300}
"""Seconds of a quick run. Parts that are left then run when the same command is given again."""
REPORTING = 10
"""Seconds of BUDGET that are kept for the report."""
WORKERS = 6
"""Processes of pytest on a machine with a GPU: compiling kernels takes longer than running them."""
TAIL = 15
"""Lines of a failed part's log that the report shows."""


class Suite:
    """The parts of a run and the folder they fill.

    Args:
        out: the folder. device: cpu or cuda. commit: of a tree that is no git checkout.
        budget: seconds of all parts together, or None.
    """

    def __init__(self, out: Path, device: str, commit: str | None = None, budget: float | None = None):
        self.out, self.device, self.commit = out, device, commit
        self.deadline = math.inf if budget is None else time.monotonic() + budget - REPORTING
        self.rows_path, self.parts_path = out / "rows.jsonl", out / "parts.jsonl"
        self.logs, self.coming = out / "logs", out / "coming"
        for folder in (self.logs, self.coming):
            folder.mkdir(parents=True, exist_ok=True)
        self.environment = environment(device, commit)
        self.source = source(self.environment["commit"])
        # a run that was killed may have left some
        self._merge_left()

    def identity(self, part: Part) -> str:
        """Identity of a part: a hash of commit, device and arguments."""
        env = self.environment
        told = [part.name, part.command, env["device"], env["gpu"], env["torch"], env["commit"], self.source]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def run(self, parts: list[Part]) -> int:
        """Run the parts that are not there yet, write the report; the exit code."""
        records = _rows(self.parts_path)
        before = {row["identity"]: row["outcome"] for row in records}
        begun = {row["identity"] for row in records if row["seconds"]}
        begun |= {row.get("identity") for row in _rows(self.rows_path)}
        passed = [part for part in parts if before.get(self.identity(part)) == PASSED and not part.again]
        self.outcomes = {part.name: PASSED for part in passed}
        for part in passed:
            _say(f"{part.name}: passed before, not repeated")
        # what nothing is known of comes first, else by worth
        left = sorted((p for p in parts if p not in passed), key=lambda part: self.identity(part) in begun)
        for part in list(left):
            lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
            if lacking:
                left.remove(part)
                self.outcomes[part.name] = SKIPPED
                self._ended(part, Ended(SKIPPED, 0, f"{', '.join(lacking)} is not installed"))
        places, memory = room(self.device)
        try:
            Schedule(left, self._start, self._ended, self.outcomes, places, memory, self.deadline).run()
        finally:
            self._merge_left()
        path = report.write(read(p for p in (self.rows_path, self.parts_path) if p.exists()), self.out)
        unfinished = [part.name for part in parts if self.outcomes[part.name] not in (PASSED, SKIPPED)]
        _say(f"{path}" + (f"; did not pass: {', '.join(unfinished)}" if unfinished else ""))
        return 1 if unfinished else 0

    def _rows_of(self, part: Part) -> Path:
        """The file that a part appends its rows to, each the moment it is known."""
        return self.coming / f"{part.name}.{self.identity(part)}.jsonl"

    def _start(self, part: Part) -> Process:
        rows = shlex.quote(str(self._rows_of(part).resolve()))
        stamp = f"--rows {rows} --device {self.device} --turns {{turns}}"
        if self.commit:
            stamp += f" --commit {shlex.quote(self.commit)}"
        merged, out = (shlex.quote(str(path.resolve())) for path in (self.rows_path, self.out))
        workers = f"-n {WORKERS}" if importlib.util.find_spec("xdist") and self.device == "cuda" else ""
        values = {"{rows}": rows, "{merged}": merged, "{out}": out, "{stamp}": stamp, "{workers}": workers}
        command = part.command
        for name, value in values.items():
            command = command.replace(name, value)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = os.environ | {"PYTHONPATH": path}
        return Process([sys.executable, *shlex.split(command)], self._log(part), ROOT, env)

    def _merge(self, path: Path, *, whole: bool = False) -> int:
        """Add a part's rows to the others, return their number; if ``whole``, they replace those of earlier tries."""
        identity, found = path.name.split(".")[-2], []
        for row in _whole_rows(path) if path.exists() else []:
            # accounts know nothing of --commit, and projections nothing of where they were made
            stamp = {"identity": identity, "commit": self.environment["commit"]}
            found.append({"kind": kind_of(row)} | self.environment | row | stamp)
        kept = [row for row in _rows(self.rows_path) if not whole or row.get("identity") != identity]
        write_atomically(self.rows_path, "".join(json.dumps(row) + "\n" for row in kept + found))
        path.unlink(missing_ok=True)
        return len(found)

    def _merge_left(self) -> None:
        """Add the rows of parts whose end nobody saw."""
        for path in sorted(self.coming.glob("*.jsonl")):
            self._merge(path)

    def _ended(self, part: Part, ended: Ended) -> None:
        rows = self._merge(self._rows_of(part), whole=ended.outcome == PASSED)
        log, tail = self._log(part), []
        if ended.outcome != PASSED and ended.seconds:
            tail = log.read_text(errors="replace").splitlines()[-TAIL:]
        tail += [ended.why] if ended.why else []
        row = {"kind": "part", "part": part.name, "outcome": ended.outcome, "seconds": ended.seconds, "rows": rows}
        row |= {"command": part.command, "log": str(log.relative_to(self.out)), "tail": tail}
        row |= {"identity": self.identity(part)} | self.environment
        kept = [old for old in _rows(self.parts_path) if old["identity"] != row["identity"]]
        write_atomically(self.parts_path, "".join(json.dumps(each) + "\n" for each in [*kept, row]))
        words = f"{part.name}: {ended.outcome}, ran {ended.seconds:.0f} s, {rows} rows"
        _say(words + (f" ({tail[-1]}; see {log})" if tail else ""))

    def _log(self, part: Part) -> Path:
        return self.logs / f"{part.name}.log"


def room(device: str) -> tuple[int, float]:
    """How many parts may run side by side, and the GiB they may take together."""
    if device == "cpu":
        # each would take the other's cores while it is timed
        return 1, math.inf
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
    return max(1, (os.cpu_count() or 1) // 3), 0.93 * total


def source(commit: str | None) -> str | None:
    """A digest of the code of a modified tree; None if the tree is that of its commit."""
    if commit and not commit.endswith("-dirty"):
        return None
    digest = hashlib.sha256()
    for folder in ("benchmarks", "kernels", "meanflow", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _rows(path: Path) -> list[dict]:
    return [row for _, row in parse(path.read_text(), str(path))] if path.exists() else []


def _whole_rows(path: Path) -> list[dict]:
    """The complete rows that a part wrote; a part that was killed may have left half a row."""
    try:
        return _rows(path)
    except UserError:
        found = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(UserError):
                found += [row for _, row in parse(line, str(path))]
        return found


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def listing(parts: list[Part]) -> str:
    """The parts as a table."""
    lines = []
    for p in parts:
        memory = f"{p.gib:g}" if p.device == "cuda" else "-"
        lines.append([p.name, p.device, " and ".join(p.runs), p.seconds, p.limit, memory, f"python {p.command}"])
    head = (
        "In this order, side by side where there is room. {stamp} is --rows FILE --device DEVICE --turns FD and "
        "--commit HASH where one was given, {rows} the file alone, {out} DIR"
    )
    return head + "\n" + table(["part", "device", "run", "seconds", "at most", "GiB", "command"], lines)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help="run these alone (default all of the run; see --list)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the rows, the logs and the report")
    parser.add_argument("--full", action="store_true", help="every part")
    parser.add_argument("--budget", type=finite, metavar="SECONDS",
                        help="of all parts; the same command again goes on (default 540 on a GPU and 300 on a CPU, "
                             "none with --full)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first")
    parser.add_argument("--rehearse", action="store_true",
                        help="S/8 in the place of every model, to see whether all parts run")  # fmt: skip
    parser.add_argument("--commit", metavar="HASH", help="of a tree that is no git checkout")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    options = parser.parse_args(args)
    if options.list:
        print(listing(PARTS))
        return 0
    if options.out is None:
        parser.error("--out: got nothing, wanted a folder for the rows and the report")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but torch sees no NVIDIA GPU here, wanted cpu")
    # ended from outside: the part that runs ends too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    budget = options.budget or (None if options.full else BUDGET[device])
    try:
        suite = Suite(options.out, device, options.commit, budget)
        parts = chosen(device, full=options.full, tests=not options.skip_tests)
        if unknown := set(options.parts) - {part.name for part in parts}:
            parser.error(f"PART: got {min(unknown)}, wanted some of {', '.join(part.name for part in parts)}")
        parts = [part for part in parts if part.name in (options.parts or part.name)]
        return suite.run([rehearsed(part) for part in parts] if options.rehearse else parts)
    except UserError as error:
        print(f"benchmarks.suite: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("benchmarks.suite: stopped; the same command again goes on")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
