"""Everything that is measured, in parts, and one report: ``python -m benchmarks.suite --out DIR``.

python -m benchmarks.suite --out DIR                  the quick parts, on a GPU within 8 minutes
python -m benchmarks.suite --out DIR --full           all of them, each part within 9 minutes
python -m benchmarks.suite --out DIR --device cpu     small sizes, marked as CPU, within 5 minutes on 2 cores
python -m benchmarks.suite --list                     the parts and their commands

Tests run first, and nothing is timed where one fails or they take too long; a quick run on a GPU takes those of the
kernels at the sizes that it times. What a part leaves of its time is the next ones'. The rows of a part are merged into
DIR/rows.jsonl when it has ended, so the same command again resumes: parts that passed at this commit, on this device
and with these arguments are not repeated. DIR/parts.jsonl says how each ended, DIR/logs/PART.log what it printed,
DIR/report.html shows it all, DIR/*.trace.json are traces for https://ui.perfetto.dev.
Exit code: 0 all parts passed, 1 a part failed or no time was left for it, 2 a wrong argument.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from meanflow.errors import UserError
from meanflow.runlog import write_atomically

from . import report
from .environment import environment
from .parts import PARTS, Part, chosen, gate
from .rows import kind_of, parse, read
from .table import table

ROOT = Path(__file__).parents[1]
BUDGET = {"cuda": 480, "cpu": 300}
"""Seconds of all parts of a quick run; what is left then waits for the same command again."""
TAIL = 15
"""Lines of a failed part's log that the report shows."""


class Suite:
    """The parts of a run and the folder they fill.

    Args:
        out: the folder. device: cpu or cuda. commit: of a tree that is no git checkout.
        budget: seconds of all parts together, or None.
    """

    def __init__(self, out: Path, device: str, commit: str | None = None, budget: float | None = None):
        self.out, self.device, self.commit, self.budget = out, device, commit, budget
        self.rows_path, self.parts_path, self.logs = out / "rows.jsonl", out / "parts.jsonl", out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = environment(device, commit)
        self.source = source(self.environment["commit"])
        self.begin = time.monotonic()

    def identity(self, part: Part) -> str:
        """Of a part at this commit, on this device, with these arguments."""
        env = self.environment
        told = [part.name, part.command, env["device"], env["gpu"], env["torch"], env["commit"], self.source]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def run(self, parts: list[Part], tests: Part | None) -> int:
        """Run the parts that are not there yet, write the report; the exit code."""
        parts, outcomes = ([tests] if tests else []) + parts, []
        for number, part in enumerate(parts, 1):
            place = f"[{number}/{len(parts)}] {part.name}"
            outcome = self._outcome(part, place, later=sum(p.limit for p in parts[number:] if not self._passed(p)))
            outcomes.append(outcome)
            if part is tests and outcome != "passed":
                _say(f"benchmarks.suite: tests: {outcome}; nothing was timed: see {self._log(part)}")
                if outcome == "out of time":
                    _say("the same command again finds its kernels compiled; --skip-tests times without them")
                return 1
        path = report.write(read(p for p in (self.rows_path, self.parts_path) if p.exists()), self.out)
        unfinished = [p.name for p, o in zip(parts, outcomes, strict=True) if o not in ("passed", "skipped")]
        _say(f"{path}" + (f"; did not pass: {', '.join(unfinished)}" if unfinished else ""))
        return 1 if unfinished else 0

    def _passed(self, part: Part) -> bool:
        """Whether a part has passed before and is not to be made again."""
        identity = self.identity(part)
        passed = any(row["identity"] == identity and row["outcome"] == "passed" for row in _rows(self.parts_path))
        return passed and not part.again

    def _seconds(self, part: Part, later: float) -> float:
        """For a part: its limit, and what is left of a budget beyond the limits of those that come ``later``."""
        if self.budget is None:
            return part.limit
        left = self.begin + self.budget - time.monotonic()
        return max(min(part.limit, left), left - later)

    def _outcome(self, part: Part, place: str, later: float) -> str:
        """Run a part unless it has passed before."""
        identity = self.identity(part)
        if self._passed(part):
            _say(f"{place}: passed before, not repeated")
            return "passed"
        lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if lacking:
            return self._record(part, "skipped", 0, 0, [f"{', '.join(lacking)} is not installed"], place)
        left = self._seconds(part, later)
        if left <= 0:
            return self._record(part, "out of time", 0, 0, ["no time was left: the same command again goes on"], place)
        _say(f"{place}: python {part.command}")
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            code = self._call(part, Path(folder) / "rows.jsonl", left)
            seconds = time.monotonic() - begin
            rows = self._merge(identity, Path(folder) / "rows.jsonl")
        outcome = "passed" if code == 0 else "out of time" if code is None else "failed"
        tail = self._log(part).read_text(errors="replace").splitlines()[-TAIL:] if code != 0 else []
        return self._record(part, outcome, seconds, rows, tail, place)

    def _call(self, part: Part, rows: Path, seconds: float) -> int | None:
        """The exit code of a part's command, None where its time ran out."""
        stamp = f"--rows {shlex.quote(str(rows))} --device {self.device}"
        if self.commit:
            stamp += f" --commit {shlex.quote(self.commit)}"
        workers = "-n 6" if importlib.util.find_spec("xdist") else ""
        command = part.command
        merged, out = (shlex.quote(str(path.resolve())) for path in (self.rows_path, self.out))
        values = {"{rows}": shlex.quote(str(rows)), "{merged}": merged, "{out}": out}
        values |= {"{stamp}": stamp, "{workers}": workers}
        for name, value in values.items():
            command = command.replace(name, value)
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = os.environ | {"PYTHONPATH": path}
        with self._log(part).open("w") as log:
            log.write(f"python {command}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, *shlex.split(command)], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                # a session of its own, so that what it started ends with it
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _merge(self, identity: str, path: Path) -> int:
        """Put a part's rows in the place of those that an earlier try left; how many there are."""
        found = []
        for row in _whole_rows(path):
            # accounts know nothing of --commit, and projections nothing of where they were made
            stamp = {"identity": identity, "commit": self.environment["commit"]}
            found.append({"kind": kind_of(row)} | self.environment | row | stamp)
        kept = [row for row in _rows(self.rows_path) if row.get("identity") != identity]
        write_atomically(self.rows_path, "".join(json.dumps(row) + "\n" for row in kept + found))
        return len(found)

    def _record(self, part: Part, outcome: str, seconds: float, rows: int, tail: list[str], place: str) -> str:
        row = {"kind": "part", "part": part.name, "outcome": outcome, "seconds": seconds, "rows": rows}
        row |= {"command": part.command, "log": str(self._log(part).relative_to(self.out)), "tail": tail}
        row |= {"identity": self.identity(part)} | self.environment
        kept = [old for old in _rows(self.parts_path) if old["identity"] != row["identity"]]
        write_atomically(self.parts_path, "".join(json.dumps(each) + "\n" for each in [*kept, row]))
        _say(f"{place}: {outcome}, {seconds:.0f} s, {row['rows']} rows" + (f" ({tail[-1]})" if tail else ""))
        return outcome

    def _log(self, part: Part) -> Path:
        return self.logs / f"{part.name}.log"


def source(commit: str | None) -> str | None:
    """What tells a modified tree from another: a digest of its code; None where the commit says it all."""
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
    """The rows that a part wrote; where it was killed it may have left half a row."""
    try:
        return _rows(path)
    except UserError:
        found = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(UserError):
                found += [row for _, row in parse(line, str(path))]
        return found


def _end_with_parent() -> None:
    """Ask Linux to end this process when the suite is killed: nothing is timed beside what a killed run left."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def listing(parts: list[Part]) -> str:
    """The parts as a table."""
    lines = [[p.name, p.device, " and ".join(p.runs), p.limit, f"python {p.command}"] for p in parts]
    head = (
        "{stamp} is --rows FILE --device DEVICE and --commit HASH where one was given, {rows} the file alone, {out} DIR"
    )
    return head + "\n" + table(["part", "device", "run", "seconds at most", "command"], lines)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.suite", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the rows, the logs and the report")
    parser.add_argument("--full", action="store_true", help="every part, however long they take together")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--skip-tests", action="store_true", help="time without testing first")
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
    suite = Suite(options.out, device, options.commit, None if options.full else BUDGET[device])
    try:
        return suite.run(
            chosen(PARTS, device, full=options.full), None if options.skip_tests else gate(device, full=options.full)
        )
    except UserError as error:
        print(f"benchmarks.suite: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("benchmarks.suite: stopped; the same command again goes on")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
