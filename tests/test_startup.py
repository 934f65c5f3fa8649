"""What a command does before anything else: find its environment, say how threads wait, or what is missing."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "script": ["scripts/train.py", "digits", "--out", "a b"],
    "another script": ["scripts/sample.py"],
    "benchmark": ["-m", "benchmarks.recipes", "--json"],
}


@pytest.fixture
def tree(tmp_path):
    """The source tree, without an environment."""
    for name in ("meanflow", "kernels", "scripts", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("meanflow", "scripts"):  # which find the tree by their own place
        (tmp_path / name).unlink()
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def make_venv(tree: Path) -> None:
    """An environment whose Python says how it was called."""
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    python.chmod(0o755)


def run(tree: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CONDA_PREFIX", "OMP_WAIT_POLICY")}
    return subprocess.run([sys.executable, *args], cwd=tree, env=inherited | env, capture_output=True, text=True)


@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_a_python_without_packages_gives_way_to_the_environment(tree, args):
    make_venv(tree)
    done = run(tree, "-S", *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["-S", *args]


@pytest.mark.parametrize("args", COMMANDS.values(), ids=COMMANDS)
def test_without_an_environment_one_line_says_what_is_missing(tree, args):
    done = run(tree, "-S", *args)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"got {sys.executable}, which lacks " in done.stderr and "torch" in done.stderr
    assert "bash scripts/setup.sh makes one" in done.stderr


def test_a_chosen_environment_that_has_all_stays(tree):
    make_venv(tree)
    (tree / "scripts" / "tell.py").write_text("""
import os, startup, sys, types
sys.modules["meanflow.apps.tell"] = types.SimpleNamespace(run=lambda: print(os.environ["OMP_WAIT_POLICY"]))
startup.run("tell")
""")
    # a wait policy of the user's own stays too
    done = run(tree, "scripts/tell.py", CONDA_PREFIX="/conda", OMP_WAIT_POLICY="ACTIVE")
    assert (done.stdout, done.returncode) == ("ACTIVE\n", 0), done.stderr


def test_every_command_starts_so():
    commands = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py") if path.stem != "startup"}
    assert len(commands) == 11
    for name, text in commands.items():
        lines = [line.strip() for line in text.splitlines()[2:] if line]
        assert lines == ["import startup", 'if __name__ == "__main__":', f'startup.run("{name}")'], name


def test_threads_by_the_work(monkeypatch):
    import torch

    from meanflow.presets import preset
    from meanflow.training.engine import fit_threads

    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    digits, large = preset("digits").model, preset("imagenet-xl2").model
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    fit_threads(digits, 64)
    assert taken == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    for model, batch in ((digits, 64), (digits, 1), (large, 32)):
        fit_threads(model, batch)
    assert taken == [3, 1, 64]


@pytest.mark.parametrize(
    ("others", "given", "policy"), [(2, None, "PASSIVE"), (1, None, None), (4, "ACTIVE", "ACTIVE"), (0, None, None)]
)
def test_threads_wait_passively_where_others_work(monkeypatch, others, given, policy):
    from meanflow import startup

    monkeypatch.setattr(startup, "others", lambda: others)
    monkeypatch.setattr(startup.os, "cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    startup.choose_waiting()
    assert startup.os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


@pytest.mark.parametrize(
    ("running", "others"),
    [([5], 4), ([1], 0), ([1, 9, 1, 1], 0), ([3, 3, 1], 2)],
    ids=["busy", "alone", "burst", "lull"],
)
def test_who_is_at_work_is_read_at_once(monkeypatch, tmp_path, running, others):
    from meanflow import startup

    stat, looks = tmp_path / "stat", itertools.cycle(running)
    monkeypatch.setattr(startup, "STAT", str(stat))
    pause = lambda _: stat.write_text(f"cpu  9 0 9\nprocs_running {next(looks)}\nprocs_blocked 7\n")  # noqa: E731
    monkeypatch.setattr(startup.time, "sleep", pause)
    monkeypatch.setattr(startup.os, "getloadavg", lambda: (50.0, 50.0, 50.0))  # of a minute that is over
    assert startup.others() == others


def test_where_no_kernel_says_who_is_at_work_the_load_average_does(monkeypatch, tmp_path):
    from meanflow import startup

    monkeypatch.setattr(startup, "STAT", str(tmp_path / "none"))
    monkeypatch.setattr(startup.os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    assert startup.others() == 3.5


def test_compiled_code_outlives_a_reboot(monkeypatch, tmp_path):
    from meanflow import startup

    name = "TORCHINDUCTOR_CACHE_DIR"

    def kept(**environment):
        for key in (name, "XDG_CACHE_HOME"):
            monkeypatch.delenv(key, raising=False)
        for key, value in environment.items():
            monkeypatch.setenv(key, str(value))
        startup.keep_compiled()
        found = startup.os.environ.get(name)
        monkeypatch.delenv(name, raising=False)
        return found

    home = kept(HOME=tmp_path / "home")
    assert home.startswith(str(tmp_path / "home" / ".cache" / "meanflow" / "compiled-")) and Path(home).is_dir()
    assert kept(XDG_CACHE_HOME=tmp_path / "caches").startswith(str(tmp_path / "caches" / "meanflow"))
    assert kept(**{name: "/of/the/user"}) == "/of/the/user"
    (tmp_path / "file").touch()
    assert kept(XDG_CACHE_HOME=tmp_path / "file") is None
    # another processor's code is not taken
    other = tmp_path / "cpuinfo"
    other.write_text("processor : 0\nflags : sse2\n")
    monkeypatch.setattr(startup, "CPUINFO", str(other))
    assert kept(HOME=tmp_path / "home") != home


@pytest.mark.parametrize(
    ("visible", "files", "size", "seen"),
    [
        (None, ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"], 2, ["0", "1"]),
        ("3,1", ["nvidia0"], 2, ["3", "1"]),
        ("GPU-8932f937, MIG-3eb87630-93d5,2", [], 3, ["GPU-8932f937", "MIG-3eb87630-93d5", "2"]),
        # more than are needed, too few, hidden ones, none, a process alone, a machine without
        ("4,5,6", [], 2, ["4", "5"]),
        ("4,5", [], 3, None),
        ("4,-1,5", [], 2, None),
        ("", ["nvidia0", "nvidia1"], 2, None),
        (None, ["nvidia0", "nvidia1"], 1, None),
        (None, ["null"], 2, None),
    ],
)
def test_each_process_of_a_machine_sees_its_own_gpu(monkeypatch, tmp_path, visible, files, size, seen):
    from meanflow import startup

    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(startup, "DEVICES", str(tmp_path))
    with monkeypatch.context() as without_torch:
        without_torch.delitem(sys.modules, "torch")
        for rank in range(size):
            environment = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "CUDA_VISIBLE_DEVICES": visible}
            environment = {name: value for name, value in environment.items() if value is not None}
            monkeypatch.setattr(startup.os, "environ", dict(environment))
            startup.see_own_gpu()
            own = {} if seen is None else {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": seen[rank]}
            assert startup.os.environ == environment | own
    import torch  # noqa: F401

    monkeypatch.setattr(startup.os, "environ", dict(environment))
    startup.see_own_gpu()
    assert startup.os.environ == environment
