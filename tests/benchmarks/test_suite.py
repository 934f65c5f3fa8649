"""benchmarks.suite: what it makes of parts that pass, fail, hang and are killed. The parts here are stubs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import torch

from benchmarks import projection, suite
from benchmarks.parts.catalogue import ATTENTION_TESTS, CUDA_PARTS, ELSEWHERE, PARTS, RECIPES, Part, chosen, rehearsed
from benchmarks.suite import Suite
from benchmarks.workloads.step_variants import VARIANTS

ROW = {"model": "S/8", "batch": 4, "precision": "fp32", "ms": 3.0, "ms_20": 2.0, "ms_80": 4.0}
ROW |= {"images_per_second": 1.0, "device": "cpu", "commit": "abc"}


def stub(name: str, code: str = "", *, write: bool = True, **options) -> Part:
    """A part that notes in the folder $SEEN that it ran, writes a row, and then does ``code``."""
    text = "import json, os, pathlib, sys, time; rows = pathlib.Path(sys.argv[1]); "
    text += f"note = open(os.environ['SEEN'], 'a'); note.write('{name} '); note.close(); "
    if write:
        row = ROW | {"variant": name}
        text += f"rows.write_text(json.dumps({row!r}) + chr(10)); "
    return Part(name, "cpu", f"-c {shlex.quote(text + (code or 'pass'))} {{rows}}", **options)


@pytest.fixture(autouse=True)
def seen(tmp_path, monkeypatch):
    """The file that names the stubs that ran."""
    path = tmp_path / "seen"
    path.touch()
    monkeypatch.setenv("SEEN", str(path))
    return path


def variants(out: Path) -> list[str]:
    return [json.loads(line)["variant"] for line in (out / "rows.jsonl").read_text().splitlines()]


def outcomes(out: Path) -> dict[str, str]:
    found = map(json.loads, (out / "parts.jsonl").read_text().splitlines())
    return {row["part"]: row["outcome"] for row in found}


def test_parts_run_once_and_make_a_report(tmp_path, seen, capsys):
    out = tmp_path / "out"
    parts = [stub("tests", write=False), stub("one", tests=("tests",)), stub("two", tests=("tests",))]
    assert Suite(out, "cpu", "abc").run(parts) == 0
    assert seen.read_text().split() == ["tests", "one", "two"]
    assert "one: passed" in capsys.readouterr().err
    assert Suite(out, "cpu", "abc").run(parts) == 0
    assert seen.read_text().split() == ["tests", "one", "two"]
    assert "one: passed before, not repeated" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert variants(out) == ["one", "two"] and {row["kind"] for row in rows} == {"step"}
    text = (out / "report.html").read_text()
    assert '<td class="words">one</td><td>3.000</td>' in text


@pytest.mark.parametrize("change", ["commit", "arguments"])
def test_another_commit_or_other_arguments_run_again(tmp_path, seen, change):
    out = tmp_path / "out"
    assert Suite(out, "cpu", "abc").run([stub("one")]) == 0
    commit, code = ("abd", "") if change == "commit" else ("abc", "0")
    assert Suite(out, "cpu", commit).run([stub("one", code)]) == 0
    assert seen.read_text().split() == ["one", "one"]
    assert len(variants(out)) == 2


@pytest.mark.parametrize("how", ["failed", "out of time"])
def test_tests_that_do_not_pass_stop_the_timing_of_what_they_test(tmp_path, seen, capsys, how):
    out = tmp_path / "out"
    code, limit = ("print('1 failed'); sys.exit(1)", 60) if how == "failed" else ("time.sleep(60)", 1)
    tests = stub("tests", code, write=False, limit=limit)
    assert Suite(out, "cpu", "abc").run([tests, stub("one", tests=("tests",)), stub("free")]) == 1
    assert seen.read_text().split() == ["tests", "free"]
    assert outcomes(out) == {"tests": how, "one": "failed", "free": "passed"}
    words = capsys.readouterr().err
    assert "one: failed, ran 0 s, 0 rows (tests did not pass: nothing of this was timed" in words
    assert how == "out of time" or "1 failed" in (out / "logs/tests.log").read_text()


def test_a_part_may_write_beside_the_report(tmp_path):
    part = stub("one", "pathlib.Path(sys.argv[2], 'step.trace.json').touch()")
    part = Part(**vars(part) | {"command": f"{part.command} {{out}}"})
    Suite(tmp_path / "out", "cpu", "abc").run([part])
    assert (tmp_path / "out" / "step.trace.json").exists()


def test_a_failing_part_stops_no_other(tmp_path, seen, capsys):
    out, mended = tmp_path / "out", tmp_path / "mended"
    code = f"print('out of <luck>'); sys.exit(0 if pathlib.Path({str(mended)!r}).exists() else 3)"
    parts = [stub("one"), stub("two", code), stub("three")]
    assert Suite(out, "cpu", "abc").run(parts) == 1
    assert "did not pass: two" in capsys.readouterr().err
    assert outcomes(out) == {"one": "passed", "two": "failed", "three": "passed"}
    text = (out / "report.html").read_text()
    assert '<p class="failed">two: failed</p>' in text and "out of &lt;luck&gt;" in text
    mended.touch()
    # what it wrote before it failed is replaced
    assert Suite(out, "cpu", "abc").run(parts) == 0
    assert seen.read_text().split() == ["one", "two", "three", "two"]
    assert sorted(variants(out)) == ["one", "three", "two"]
    assert outcomes(out)["two"] == "passed"
    assert "two: failed" not in (out / "report.html").read_text()


def test_a_part_that_hangs_is_ended_with_all_it_started(tmp_path, capfd):
    out, pid = tmp_path / "out", tmp_path / "pid"
    child = "import subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    child += f"pathlib.Path({str(pid)!r}).write_text(str(child.pid)); "
    child += "rows.open('a').write('{\"variant\": \"ha'); time.sleep(60)"
    begin = time.monotonic()
    assert Suite(out, "cpu", "abc").run([stub("slow", child, limit=2), stub("next")]) == 1
    assert time.monotonic() - begin < 30
    assert outcomes(out) == {"slow": "out of time", "next": "passed"}
    # whole rows stay, half a row does not
    assert variants(out) == ["slow", "next"]
    assert gone(int(pid.read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_cut_by_a_budget_the_same_command_ends_as_one_long_call(tmp_path, seen, capsys):
    mended, parts = tmp_path / "mended", []
    for name in ("one", "two", "three"):
        wait = f"time.sleep(0 if pathlib.Path({str(mended)!r}).exists() or {name == 'one'} else 60)"
        parts.append(stub(name, wait))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert Suite(cut, "cpu", "abc", budget=suite.REPORTING + 3).run(parts) == 1
    assert "no time was left" in capsys.readouterr().err
    assert outcomes(cut) == {"one": "passed", "two": "out of time", "three": "out of time"}
    # what was known is there, of the one that was cut too
    assert variants(cut) == ["one", "two"]
    mended.touch()
    for out in (cut, whole):
        assert Suite(out, "cpu", "abc", budget=100).run(parts) == 0
    # that of which nothing was known came first
    assert seen.read_text().split()[2:4] == ["three", "two"]
    assert sorted(variants(cut)) == sorted(variants(whole)) == ["one", "three", "two"]


def test_a_part_whose_module_is_missing_is_skipped(tmp_path, seen):
    out = tmp_path / "out"
    assert Suite(out, "cpu", "abc").run([stub("one", needs=("no_such_module",)), stub("two")]) == 0
    assert seen.read_text().split() == ["two"]
    assert outcomes(out) == {"one": "skipped", "two": "passed"}
    assert "no_such_module is not installed" in (out / "report.html").read_text()


def test_a_part_made_of_others_is_made_again(tmp_path, seen):
    out, code = tmp_path / "out", "rows.write_text(open(sys.argv[2]).read().replace('one', 'sum'))"
    total = stub("sum", code, write=False, again=True)
    parts = [stub("one"), Part(**vars(total) | {"command": f"{total.command} {{merged}}"})]
    for _ in range(2):
        assert Suite(out, "cpu", "abc").run(parts[:1]) == 0
        assert Suite(out, "cpu", "abc").run(parts[1:]) == 0
    assert seen.read_text().split() == ["one", "sum", "sum"]


def test_accounts_are_a_row(tmp_path):
    accounts = {"preset": "p", "step_in_forwards": 3.0, "environment": {"device": "cpu", "commit": None}}
    code = f"rows.write_text(json.dumps({accounts!r}, indent=1))"
    Suite(tmp_path / "out", "cpu", "abc").run([stub("accounts", code)])
    (row,) = map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())
    assert (row["kind"], row["device"], row["commit"], row["preset"]) == ("accounting", "cpu", "abc", "p")


def with_a_slow_one(slow: Path) -> list[Part]:
    """Three parts; the second writes its process to the file, if it is there, and sleeps."""
    wait = f"slow = pathlib.Path({str(slow)!r}); "
    wait += "slow.exists() and (slow.write_text(str(os.getpid())), time.sleep(60))"
    return [stub("one"), stub("two", wait), stub("three")]


DRIVER = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_suite import with_a_slow_one
from benchmarks.suite import Suite
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
sys.exit(Suite(Path(sys.argv[1]), "cpu", "abc").run(with_a_slow_one(Path(sys.argv[3]))))
"""


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["killed", "asked"]
)
def test_a_run_that_was_killed_goes_on(tmp_path, seen, how):
    out, slow = tmp_path / "out", tmp_path / "slow"
    slow.touch()
    command = [sys.executable, "-c", DRIVER, str(out), str(Path(__file__).parent), str(slow)]
    env = fresh.environment() | {"SEEN": str(seen)}
    env["PYTHONPATH"] += os.pathsep + str(Path(fresh.__file__).parent)
    run = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    for _ in range(300):
        if slow.read_text():
            break
        time.sleep(0.1)
    run.send_signal(how)
    assert run.wait(30) == (-signal.SIGKILL if how == signal.SIGKILL else 143)
    assert gone(int(slow.read_text()))
    slow.unlink()
    # what it had written is there, at the latest when the next one starts
    again = Suite(out, "cpu", "abc")
    assert variants(out) == ["one", "two"]
    assert again.run(with_a_slow_one(slow)) == 0
    assert seen.read_text().split() == ["one", "two", "three", "two"]
    assert variants(out) == ["one", "three", "two"]


# --- the table ---


def test_parts_have_names_and_limits():
    for device in ("cpu", "cuda"):
        for full in (False, True):
            parts = chosen(device, full=full)
            names = [part.name for part in parts]
            assert names and len(set(names)) == len(names)
            assert all({*part.tests, *part.after} <= set(names) for part in parts)
    assert all(part.seconds < part.limit <= 540 for part in PARTS if part.device == "cuda")


def test_nothing_begins_before_the_libraries_are_built():
    first, *others = chosen("cuda", full=True)
    assert first.name == "build" and all(part.after == ("build",) for part in others)


def test_a_rehearsal_projects_committed_rows(capsys):
    (part,) = (rehearsed(part) for part in CUDA_PARTS if part.name == "projection")
    rows = part.command.split()[2]
    projection.main([rows])
    assert "imagenet-" in capsys.readouterr().out


def test_a_rehearsal_trains_small_models_alone():
    for part in chosen("cuda", full=True):
        command = rehearsed(part).command
        assert not re.search(r"\b(XL|L|M|B)/\d", command), command
        assert not re.search(r"imagenet-|imf-(b|xl)2", command) or "benchmarks.accounting" in command
        modelless = re.match(r"-m (pytest|benchmarks\.(build|tune|accounting|projection)) ?", command)
        assert modelless or "S/8" in command or "digits-imf" in command, command  # a default would be of full size


def test_without_tests_nothing_waits_for_them():
    parts = chosen("cuda", full=False, tests=False)
    assert not any(part.tests or part.name.startswith("tests") for part in parts)


def test_every_kernel_is_tested_before_it_is_timed():
    parts = {part.name: part for part in CUDA_PARTS}
    apart = set(ATTENTION_TESTS)
    assert apart == {str(path.relative_to(suite.ROOT)) for path in suite.ROOT.glob("tests/kernels/test_attention*.py")}
    assert apart <= set(shlex.split(parts["tests-attention"].command))
    words = set(shlex.split(parts["tests-operators"].command))
    # the static report needs no GPU, and takes long
    assert {
        *(f"--ignore={path}" for path in apart),
        "tests/kernels",
        "--ignore=tests/kernels/test_static_report.py",
    } <= words
    assert parts["attention"].tests == ("tests-attention",) and parts["pointwise"].tests == ("tests-operators",)


def test_every_test_that_needs_a_gpu_is_in_a_part():
    marked = {
        str(path.relative_to(suite.ROOT))
        for path in suite.ROOT.glob("tests/**/test_*.py")
        if "mark.gpu" in path.read_text() and path.parent.name != "kernels" and path != Path(__file__)
    }
    assert marked == set(ELSEWHERE)


def test_commands_name_what_is_there():
    for part in PARTS:
        words = shlex.split(part.command)
        assert words[0] == "-m"
        if words[1] != "pytest":
            assert (suite.ROOT / words[1].replace(".", "/")).with_suffix(".py").exists(), part
        files = [word for word in words if word.startswith(("tests/", "benchmarks/"))]
        assert all((suite.ROOT / file).exists() for file in files) and (files or words[1] != "pytest"), part
        if not part.name.startswith("tests") and part.name != "build":
            assert "{stamp}" in words or "{rows}" in words


def test_full_is_everything():
    full = " ".join(part.command for part in chosen("cuda", full=True)) + " "
    for path in suite.ROOT.glob("benchmarks/bench_*.py"):
        assert f"benchmarks/{path.name} " in full
    compared = {word for words in full.split("--compare ")[1:] for word in words.split()[0].split(",")}
    # what is left out of the eager step is timed on a CPU
    eager = {name for name in VARIANTS if name.startswith("ours-eager-")}
    assert compared == set(VARIANTS) - eager
    assert ",".join(["ours-eager", *(name for name in VARIANTS if name in eager)]) in " ".join(
        part.command for part in chosen("cpu", full=False)
    )
    for name in RECIPES:
        assert f"benchmarks.step --preset {name} " in full and f"accounting --preset {name} " in full
    for axis in ("batch", "tokens", "model"):
        assert f"benchmarks.scaling --axis {axis} --variant ours " in full
    assert "benchmarks.breakdown " in full and "benchmarks.projection " in full
    assert "--kappa 0 " in full and "--kappa 0.5 " in full
    for device in ("cuda", "cpu"):
        for whole in (False, True):
            assert any("benchmarks.regression --self-check" in p.command for p in chosen(device, full=whole))
    assert full.count("--trace {out}/step-") == 2


def test_quick_on_a_cpu_compiles_nothing():
    for part in chosen("cpu", full=False):
        assert "ours," not in part.command and "naive-compiled" not in part.command
        assert "bench_" not in part.command or "not compiled" in part.command


def test_list(capsys):
    assert suite.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{part.name} " in text for part in PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.main(["--out", str(tmp_path / "out"), "--device", "cuda"])
    assert "torch sees no NVIDIA GPU here" in capsys.readouterr().err
