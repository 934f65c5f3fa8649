"""Everything that is measured, in parts, and one report: ``python -m benchmarks.suite --out DIR``.

python -m benchmarks.suite --out DIR                  the quick parts, on a GPU within 8 minutes
python -m benchmarks.suite --out DIR --full           all of them, each part within 9 minutes
python -m benchmarks.suite --out DIR --device cpu     small sizes, marked as CPU, within 5 minutes on 2 cores
python -m benchmarks.suite --list                     the parts and their commands

Tests run first, and nothing is timed where one fails. The rows of a part are merged into DIR/rows.jsonl when it has
ended, so the same command again resumes: parts that passed at this commit, on this device and with these arguments are
not repeated. DIR/parts.jsonl says how each ended, DIR/logs/PART.log what it printed, DIR/report.html shows it all.
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
from dataclasses import dataclass
from pathlib import Path

import torch

from meanflow.errors import UserError
from meanflow.runlog import write_atomically

from . import report
from .environment import environment
from .rows import kind_of, parse, read
from .table import table
from .variants import VARIANTS

ROOT = Path(__file__).parents[1]
LIMIT = 540
"""Seconds of a part at most, unless it says less."""
BUDGET = {"cuda": 480, "cpu": 300}
"""Seconds of all parts of a quick run; what is left then waits for the same command again."""
TAIL = 15
"""Lines of a failed part's log that the report shows."""


@dataclass(frozen=True)
class Part:
    """A command that makes rows."""

    name: str
    device: str
    command: str
    """Arguments of Python; {rows} is the file to write, {merged} all rows so far, {stamp} the options --rows,
    --device and --commit, {workers} pytest's processes."""
    runs: tuple[str, ...] = ("quick", "full")
    """The runs that it is a part of."""
    limit: int = LIMIT
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    again: bool = False
    """Made from other parts' rows, and made again in each run."""


PYTEST = "-m pytest -q -rs -p no:cacheprovider"
OPS = ("adaln", "gate_adaln", "bias_gelu", "silu", "linear", "timestep_embedding")
RECIPES = {"b4": 256, "b2": 64, "m2": 32, "l2": 32, "xl2": 32, "xl2-plus": 32}
"""The paper's Table 4: the batch on one GPU, a part of 256."""
TINY = "--precision fp32 --kappa 0.5"
ABLATED = {"b4": ("B/4", 256), "xl2": ("XL/2", 32)}
EAGER = "not compiled and not reference and not N1024 and not hd64"
"""Benches that need no compiler but Triton's, at one size of attention."""


def step(model: str, batch: int, options: str, compare: str) -> str:
    return f"-m benchmarks.step --model {model} --batch {batch} {options} --compare {compare} {{stamp}}"


def bench(op: str, choice: str = "") -> str:
    only = f" -k {shlex.quote(choice)}" if choice else ""
    return f"{PYTEST} --benchmark-quiet {{stamp}} benchmarks/bench_{op}.py{only}"


def accounts(recipe: str) -> str:
    return f"-m benchmarks.accounting --preset imagenet-{recipe} --batch {RECIPES[recipe]} --json {{rows}}"


def recipe(name: str) -> str:
    return f"-m benchmarks.step --preset imagenet-{name} --batch {RECIPES[name]} --compare {COMPARED} {{stamp}}"


def scaling(axis: str, variant: str, options: str) -> str:
    return f"-m benchmarks.scaling --axis {axis} --variant {variant} {options} {{stamp}}"


def breakdown(model: str, batch: int, options: str) -> str:
    return f"-m benchmarks.breakdown --model {model} --batch {batch} {options} {{stamp}}"


def tests(device: str, *, full: bool) -> Part:
    """What has to pass before anything is timed."""
    if device == "cpu":
        files = "tests/kernels/test_attention.py tests/kernels/test_counts.py tests/meanflow/test_plan.py"
        return Part("tests", device, f"{PYTEST} {files}", limit=90)
    only = "" if full else " -m gpu"
    # several processes, because compiling the kernels takes longer than running them
    command = f"{PYTEST} {{workers}} --ignore=tests/kernels/test_static_report.py tests/kernels{only}"
    return Part("tests", device, command, limit=LIMIT if full else 180)


SCALING = {"batch": "--model XL/2", "tokens": "--model B/2 --batch 8", "model": "--batch 32"}
KERNELS = {"needs": ("pytest_benchmark",)}
COMPARED = "naive,naive-compiled,ours,ours-captured"
ABLATION = ",".join(["ours", *(name for name in VARIANTS if name not in COMPARED.split(","))])

PARTS = [
    # the quick run on a GPU; --full measures the same and more
    Part("step-b4", "cuda", step("B/4", 256, "--kappa 0.5", "naive,ours"), ("quick",), 180),
    Part("step-xl2", "cuda", step("XL/2", 32, "--kappa 0.5", "naive,ours"), ("quick",), 240),
    Part("attention", "cuda", bench("attention", EAGER), ("quick",), 90, **KERNELS),
    *(Part(op, "cuda", bench(op, EAGER), ("quick",), 60, **KERNELS) for op in OPS),
    Part("optimizer", "cuda", "-m benchmarks.optimizer {stamp}", limit=60),
    *(Part(f"accounting-{name}", "cuda", accounts(name), limit=60) for name in ("b4", "xl2")),
    # what --full adds
    *(Part(f"{op}-all", "cuda", bench(op), ("full",), **KERNELS) for op in ("attention", *OPS)),
    *(Part(f"recipe-{name}", "cuda", recipe(name), ("full",)) for name in RECIPES),
    Part("projection", "cuda", "-m benchmarks.projection {merged} --rows {rows}", ("full",), 60, again=True),
    *(
        Part(f"{title}-{name}-kappa{kappa}", "cuda", step(*size, f"--kappa {kappa}", names), ("full",))
        for name, size in ABLATED.items()
        for kappa in (0.5, 0)
        for title, names in (("variants", COMPARED), ("ablation", ABLATION))
    ),
    *(Part(f"breakdown-{name}", "cuda", breakdown(*size, "--kappa 0.5"), ("full",)) for name, size in ABLATED.items()),
    *(
        Part(f"scaling-{axis}-{variant}", "cuda", scaling(axis, variant, options), ("full",))
        for axis, options in SCALING.items()
        for variant in ("ours", "naive")
    ),
    *(Part(f"accounting-{name}", "cuda", accounts(name), ("full",)) for name in RECIPES if name not in ("b4", "xl2")),
    # on a CPU
    Part("step-s8", "cpu", step("S/8", 4, TINY, "naive,ours-eager"), limit=90),
    Part("attention", "cpu", bench("attention", "not compiled and hd72 and not N1024"), limit=60, **KERNELS),
    Part("adaln", "cpu", bench("adaln", "not compiled"), limit=60, **KERNELS),
    Part("linear", "cpu", bench("linear", "not compiled"), limit=60, **KERNELS),
    Part("optimizer", "cpu", "-m benchmarks.optimizer --model S/8 --repeats 15 {stamp}", limit=60),
    Part("breakdown-s8", "cpu", breakdown("S/8", 4, f"{TINY} --eager --repeats 3"), limit=60),
    Part("scaling-s8", "cpu", scaling("batch", "ours-eager", f"--model S/8 --values 4,8,16 {TINY}"), limit=60),
    Part("accounting-b4", "cpu", accounts("b4"), limit=60),
    Part("step-s4", "cpu", step("S/4", 16, TINY, "naive,naive-compiled,ours"), ("full",)),
]
"""What is measured, in this order."""


def chosen(parts: list[Part], device: str, *, full: bool) -> list[Part]:
    return [part for part in parts if part.device == device and ("full" if full else "quick") in part.runs]


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
            outcome = self._outcome(part, place)
            outcomes.append(outcome)
            if part is tests and outcome != "passed":
                _say(f"benchmarks.suite: tests did not pass, nothing was timed: see {self._log(part)}")
                return 1
        path = report.write(read(p for p in (self.rows_path, self.parts_path) if p.exists()), self.out)
        unfinished = [p.name for p, o in zip(parts, outcomes, strict=True) if o not in ("passed", "skipped")]
        _say(f"{path}" + (f"; did not pass: {', '.join(unfinished)}" if unfinished else ""))
        return 1 if unfinished else 0

    def _outcome(self, part: Part, place: str) -> str:
        """Run a part unless it has passed before."""
        identity = self.identity(part)
        passed = any(row["identity"] == identity and row["outcome"] == "passed" for row in _rows(self.parts_path))
        if passed and not part.again:
            _say(f"{place}: passed before, not repeated")
            return "passed"
        lacking = [name for name in part.needs if importlib.util.find_spec(name) is None]
        if lacking:
            return self._record(part, "skipped", 0, 0, [f"{', '.join(lacking)} is not installed"], place)
        left = part.limit if self.budget is None else min(part.limit, self.begin + self.budget - time.monotonic())
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
        merged = shlex.quote(str(self.rows_path.resolve()))
        values = {"{rows}": shlex.quote(str(rows)), "{merged}": merged, "{stamp}": stamp, "{workers}": workers}
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
    head = "{stamp} is --rows FILE --device DEVICE and --commit HASH where one was given, {rows} the file alone"
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
            chosen(PARTS, device, full=options.full), None if options.skip_tests else tests(device, full=options.full)
        )
    except UserError as error:
        print(f"benchmarks.suite: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("benchmarks.suite: stopped; the same command again goes on")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
