"""The suite's schedule: parts that compile side by side and are timed alone, killed, stopped and late ones."""

import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import arbiter
from benchmarks.parts.catalogue import Part
from benchmarks.parts.processes import Process, family
from benchmarks.parts.schedule import Ended, Schedule

ROOT = Path(__file__).parents[2]

# a part: "compiles" in a process of its own, as compilers do, then "times" so many sections, noting when
PART = """
import json, os, subprocess, sys, time
from pathlib import Path
from benchmarks.harness import arbiter

name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[4])
for _ in range(2):
    # a command that trains several workloads joins for each
    arbiter.join(int(sys.argv[3]))

def note(**row):
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row | {"at": time.monotonic()}) + "\\n")

begin, clock = arbiter.running_seconds(), time.monotonic()
alive = f"open({str(folder / name)!r} + '.alive', 'a').write(str(time.monotonic()) + chr(10))"
worker = subprocess.Popen([sys.executable, "-c", f"import time\\nwhile True: {alive}; time.sleep(0.01)"])
while arbiter.running_seconds() - begin < options.get("compile", 0.3):
    time.sleep(0.01)
while not all((folder / f"{other}.alive").exists() for other in options.get("beside", [])):
    time.sleep(0.01)
for section in range(options.get("sections", 2)):
    with arbiter.alone("cpu"), arbiter.alone("cpu"):
        note(event="in", pid=os.getpid())
        time.sleep(options.get("time", 0.2))
        if options.get("dies"):
            os.kill(os.getpid(), 9)
        note(event="out")
note(event="ran", running=arbiter.running_seconds() - begin, whole=time.monotonic() - clock)
worker.kill()
"""


def part(name: str, *, limit: int = 60, gib: float = 0, after=(), tests=(), **options) -> Part:
    return Part(name, "cuda", json.dumps(options), limit=limit, gib=gib, after=after, tests=tests)


class Run:
    """A schedule of such parts, and what came of it."""

    def __init__(self, folder: Path, parts: list[Part], **options):
        self.folder, self.ended = folder, {}
        options = {"places": 8, "memory": math.inf, "outcomes": {}} | options
        self.schedule = Schedule(parts, self.start, self.record, **options)
        self.begin = time.monotonic()
        self.schedule.run()
        self.seconds = time.monotonic() - self.begin

    def start(self, part: Part) -> Process:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        command = [sys.executable, "-c", PART, part.name, str(self.folder), "{turns}", part.command]
        return Process(command, self.folder / f"{part.name}.log", ROOT, os.environ | {"PYTHONPATH": path})

    def record(self, part: Part, ended: Ended) -> None:
        assert part.name not in self.ended
        self.ended[part.name] = ended

    @property
    def outcomes(self) -> dict[str, str]:
        return {name: ended.outcome for name, ended in self.ended.items()}

    def notes(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def sections(self, name: str) -> list[tuple[float, float]]:
        at = [note["at"] for note in self.notes(name) if note["event"] in ("in", "out")]
        return list(zip(at[::2], at[1::2], strict=False))

    def alive(self, name: str) -> list[float]:
        """When a part's worker ran."""
        return [float(line) for line in (self.folder / f"{name}.alive").read_text().splitlines()]


def test_four_compile_side_by_side_and_are_timed_alone(tmp_path):
    names = ["a", "b", "c", "d"]
    # nobody is done compiling before all have begun
    run = Run(tmp_path, [part(name, beside=names) for name in names])
    assert run.outcomes == dict.fromkeys(names, "passed")
    sections = sorted((*section, name) for name in names for section in run.sections(name))
    assert len(sections) == 8
    assert all(end <= begin for (_, end, _), (begin, _, _) in zip(sections, sections[1:], strict=False))
    for begin, end, name in sections:
        for other in set(names) - {name}:
            # nothing of another part runs in it, what it started neither
            assert not [at for at in run.alive(other) if begin < at < end]


def test_stopped_time_counts_nowhere(tmp_path):
    """The slow one is stopped for longer than its limit and for longer than its own clock shows."""
    fast = [part(f"fast{k}", compile=0, sections=4, time=0.3) for k in range(3)]
    run = Run(tmp_path, [part("slow", limit=4, compile=1, sections=1), *fast])
    assert set(run.outcomes.values()) == {"passed"}
    (told,) = [note for note in run.notes("slow") if note["event"] == "ran"]
    assert told["whole"] - told["running"] > 2
    assert run.ended["slow"].seconds < run.seconds - 2


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_who_ends_in_his_turn_wakes_the_others(tmp_path, how):
    options = {"dies": True} if how == "dies" else {"time": 60}
    run = Run(tmp_path, [part("bad", limit=2, sections=1, **options), part("one", compile=1), part("two", compile=1)])
    assert run.outcomes == {"bad": "failed" if how == "dies" else "out of time", "one": "passed", "two": "passed"}
    assert [len(run.sections(name)) for name in ("bad", "one", "two")] == [0, 2, 2]
    # what it had noted before is there
    assert run.notes("bad")[0]["event"] == "in"


def test_the_time_of_all_is_over(tmp_path):
    parts = [part("done", compile=0), part("slow", compile=60), part("waits")]
    run = Run(tmp_path, parts, places=2, deadline=time.monotonic() + 4)
    assert run.outcomes["done"] == "passed" and run.outcomes["slow"] == "out of time"
    assert run.seconds < 7
    pid = run.notes("done")[0]["pid"]
    assert not family(pid)


def test_nothing_is_left_when_it_is_interrupted(tmp_path):
    class Interrupted(Run):
        def record(self, part, ended):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path, [part("first", compile=0), part("second", compile=60)])
    time.sleep(0.1)
    before = Path(tmp_path / "second.alive").read_text() if (tmp_path / "second.alive").exists() else ""
    time.sleep(0.3)
    assert before == (Path(tmp_path / "second.alive").read_text() if before else "")


def test_memory_and_places_bound_what_runs_together(tmp_path):
    big = [part(name, gib=50, compile=0.5, sections=1) for name in ("a", "b")]
    run = Run(tmp_path, [*big, part("small", gib=20, compile=0.5, sections=1)], memory=80)
    lives = {name: run.alive(name) for name in ("a", "b", "small")}
    assert lives["a"][-1] < lives["b"][0]
    assert lives["small"][0] < lives["a"][-1]
    # what fits nowhere runs alone
    assert Run(tmp_path, [part("huge", gib=500, sections=1)], memory=80).outcomes == {"huge": "passed"}


def test_what_did_not_pass_keeps_others_from_being_timed(tmp_path):
    tests = part("tests", compile=1.5, sections=0)
    timed = part("timed", compile=0, sections=1, tests=("tests",))
    run = Run(tmp_path, [timed, tests])
    assert run.outcomes == {"tests": "passed", "timed": "passed"}
    # it compiled meanwhile, and waited with timing
    (told,) = [note for note in run.notes("tests") if note["event"] == "ran"]
    assert run.alive("timed")[0] < told["at"] < run.sections("timed")[0][0]

    folder = tmp_path / "broken"
    folder.mkdir()
    broken = Part("tests", "cuda", "no JSON")
    run = Run(folder, [broken, timed, part("free", sections=1), part("after", after=("tests",))])
    assert run.outcomes == {"tests": "failed", "timed": "failed", "free": "passed", "after": "failed"}
    assert run.ended["after"].why == "tests did not pass: nothing of this was timed"
    assert not run.sections("timed")


def test_alone_outside_of_a_suite_asks_nobody():
    begin = arbiter.running_seconds()
    with arbiter.alone("cpu"):
        pass
    assert arbiter.running_seconds() >= begin


def test_idle_is_many_short_answers_in_a_row():
    answers = [1e-5] * 10 + [3e-3] + [1e-5] * arbiter.QUIET
    taken = iter(answers)
    arbiter.wait_until_idle(lambda: next(taken))
    assert next(taken, None) is None
    with pytest.raises(RuntimeError, match=r"not idle within 0\.2 s"):
        arbiter.wait_until_idle(lambda: time.sleep(0.01) or 0.01, limit=0.2)


def test_family_is_the_session_and_the_descendants(tmp_path):
    own = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    child = f"import subprocess, sys, time; {own}; time.sleep(60)"
    process = Process([sys.executable, "-c", child], tmp_path / "log", tmp_path, dict(os.environ))
    deadline = time.monotonic() + 20
    while len(family(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(family(process.pid)) == 2
    process.stop()
    assert set(family(process.pid).values()) == {"T"}
    process.wake()
    assert "T" not in family(process.pid).values()
    process.end()
    assert not [state for state in family(process.pid).values() if state not in "ZX"]
    assert shlex.quote(sys.executable) in (tmp_path / "log").read_text()
