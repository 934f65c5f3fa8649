"""scripts/gpu_check.sh: what it says without a GPU, and what it brings back from a suite that passes or fails."""

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

# stands in for python3: it "sees" a GPU, and writes for the suite what it writes
STUB = """#!/bin/bash
if [[ "$*" == *"benchmarks.suite --out"* ]]; then
    mkdir -p "$4/logs" && echo "{}" | tee "$4/rows.jsonl" "$4/logs/one.log" >"$4/report.html"
    echo "ran $*" >&2
    exit ${SUITE:-0}
fi
"""


def _run(tmp_path: Path, *arguments: str, suite: int = 0) -> subprocess.CompletedProcess:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir(exist_ok=True)
    for name in ("python3", "nvidia-smi"):
        path = bin_dir / name
        path.write_text(STUB)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}", "SUITE": str(suite)}
    env |= {"OUT": str(tmp_path / "out"), "DETAILS": str(tmp_path / "details")}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    run = subprocess.run(["bash", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == "" and len(run.stderr.splitlines()) == 1 and "no NVIDIA GPU" in run.stderr
    assert not (tmp_path / "out").exists()


def test_help_teaches(tmp_path):
    run = _run(tmp_path, "--help")
    assert run.returncode == 0
    assert all(word in run.stdout for word in ("--budget SECONDS", "--commit HASH", "details.tar.gz", "Exit code"))


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_comes_back(tmp_path, code):
    run = _run(tmp_path, "--commit", "abc", "--budget", "60", suite=code)
    assert run.returncode == code
    assert "--device cuda --commit abc --budget 60" in run.stderr
    # few files, because few come back from some machines
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["details.tar.gz", "report.html", "suite.jsonl", "summary.txt"]
    with tarfile.open(tmp_path / "out/details.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {"logs/one.log", "report.html", "rows.jsonl"} <= names
    assert "ran -m benchmarks.suite" in (tmp_path / "out/summary.txt").read_text()
