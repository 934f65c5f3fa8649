"""scripts/gpu_check.sh: what it says without a GPU, and what it makes of parts that pass, fail and run late."""

import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/gpu_check.sh"

PARTS = ["build", "static", "tests", "suite", "attention", "pointwise", "step-b4", "step-xl2", "naive-xl2"]

# stands in for python3: it "sees" a GPU, fails the commands that contain the word in FAILING, writes for the suite what
# it writes, and leaves to the real one what contains the word in REAL
STUB = f"""#!/bin/bash
[[ -n "$FAILING" && "$*" == *"$FAILING"* ]] && {{ echo "broken: $*"; exit 1; }}
[[ -n "$REAL" && "$*" == *"$REAL"* ]] && exec {sys.executable} "$@"
[[ "$*" == *"benchmarks.suite --out"* ]] && mkdir -p "$4" && echo "{{}}" | tee "$4/rows.jsonl" >"$4/report.html"
echo "ran $*"
"""


def _run(tmp_path: Path, *arguments: str, failing: str = "", real: str = "") -> subprocess.CompletedProcess:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name in ("python3", "nvidia-smi"):
        path = bin_dir / name
        path.write_text(STUB)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "FAILING": failing, "REAL": real}
    env |= {"OUT": str(tmp_path / "out"), "DETAILS": str(tmp_path / "details")}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    run = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == "" and len(run.stderr.splitlines()) == 1 and "no NVIDIA GPU" in run.stderr
    assert not (tmp_path / "out").exists()


def test_list_and_help_teach(tmp_path):
    parts = _run(tmp_path, "--list").stdout.split()
    text = _run(tmp_path, "--help").stdout
    assert parts == PARTS
    assert all(f"\n  {part} " in text for part in parts)


def test_wrong_part_is_refused(tmp_path):
    run = _run(tmp_path, "attentoin")
    assert run.returncode == 2
    assert f"no part 'attentoin', wanted some of: {' '.join(PARTS)}" in run.stderr


def test_parts_that_pass(tmp_path):
    run = _run(tmp_path, "--commit", "abc")
    assert run.returncode == 0, run.stdout + run.stderr
    # few files, because few come back from some machines
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["details.tar.gz", "report.html", "suite.jsonl", "summary.txt"]
    with tarfile.open(tmp_path / "out/details.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {*(f"logs/{part}.log" for part in PARTS), "suite/report.html"} <= names
    assert "--commit abc benchmarks/bench_attention.py" in (tmp_path / "details/logs/attention.log").read_text()
    assert "suite --commit abc" in (tmp_path / "details/logs/suite.log").read_text()
    table = run.stdout.splitlines()[-1 - len(PARTS) :]
    assert table[0].split() == ["part", "result", "seconds", "log"]
    assert [line.split()[:2] for line in table[1:]] == [[part, "passed"] for part in PARTS]


@pytest.mark.parametrize(
    ("failing", "part"),
    [
        ("setup.py", "build"),
        ("tests/kernels", "tests"),
        ("benchmarks.suite", "suite"),
        ("bench_silu.py", "pointwise"),
        ("benchmarks.static_report", "static"),
        ("--share 0", "step-xl2"),
    ],
)
def test_part_that_fails(tmp_path, failing, part):
    run = _run(tmp_path, failing=failing)
    assert run.returncode == 1
    assert "broken: " in run.stdout
    assert [line.split()[0] for line in run.stdout.splitlines() if "FAILED" in line] == [part]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_library_that_is_not_built_fails_the_build(tmp_path):
    # the stub builds nothing, so what lies there is older than the run, and what does not lie there is missing
    run = _run(tmp_path, "build", real="import MISSING")
    assert run.returncode == 1
    assert "native_cpu.so was not built, it is older than this run" in run.stdout or "has not been built" in run.stdout
    assert "what the compilers said is above" in run.stdout
    assert [line.split()[:2] for line in run.stdout.splitlines()][-1] == ["build", "FAILED"]


def test_every_bench_is_in_a_part():
    script = SCRIPT.read_text()
    for path in ROOT.glob("benchmarks/bench_*.py"):
        assert f" {path.stem.removeprefix('bench_')}" in script
