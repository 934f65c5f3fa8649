"""A folder has one owner: who has it is said, a killed one stops nobody, and a refused command leaves nothing."""

import concurrent.futures
import errno
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import caches
import numpy as np
import pytest
import runs

from meanflow import owner
from meanflow.command import _leave, stop_on_signal
from meanflow.data.cache import Builder
from meanflow.errors import UserError
from meanflow.owner import LOCK, owned
from meanflow.training.trainer import train

HOLD = """
import sys
sys.path[:0] = {path!r}
import errno, fcntl, os
from pathlib import Path
from meanflow import owner
if {without}:
    def flock(*args):
        raise OSError({without}, "no locks here")
    fcntl.flock = flock
with owner.owned(Path({folder!r})):
    print("mine", flush=True)
    sys.stdin.read()
"""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@pytest.fixture
def hold():
    """Start processes that own a folder until their input ends."""
    started = []

    def start(folder, without=0):
        code = HOLD.format(path=[p for p in sys.path if p], folder=str(folder), without=without)
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"mine\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(params=(0, *NO_LOCKS), ids=("flock", *(errno.errorcode[code] for code in NO_LOCKS)))
def file_system(request, monkeypatch):
    """One that knows locks, and those that say in several ways that they do not."""

    def flock(*args):
        raise OSError(request.param, "no locks here")

    if request.param:
        monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(owner, "PATIENCE", 0.2)
    return request.param


def test_the_other_is_told_who_has_it(hold, tmp_path, file_system):
    process = hold(tmp_path / "run", file_system)
    who = rf"another process is writing to \(process {process.pid} on {socket.gethostname()}, since 20"
    for _ in range(2):
        with pytest.raises(UserError, match=who) as error, owned(tmp_path / "run"):
            pass
        assert "\n" not in str(error.value)
    process.stdin.close()
    assert process.wait() == 0
    # whoever is done leaves nothing, not even the folder where nothing is in it
    assert not (tmp_path / "run").exists()


def test_a_killed_owner_stops_nobody(hold, tmp_path, file_system):
    process = hold(tmp_path, file_system)
    process.kill()
    process.wait()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == process.pid
    start = time.monotonic()
    with owned(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert time.monotonic() - start < owner.PATIENCE and not (tmp_path / LOCK).exists()


def test_a_lock_left_by_something_else_stops_nobody(tmp_path, file_system):
    for text in ("", "{}", "no JSON", "[1]", json.dumps({"host": "elsewhere", "process": 1})):
        (tmp_path / LOCK).write_text(text)
        with owned(tmp_path):
            pass


@pytest.mark.parametrize("file_system", NO_LOCKS[:1], indirect=True)
def test_without_locks_another_machine_is_believed_while_it_gives_signs_of_life(tmp_path, file_system):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "elsewhere", "process": 1, "time": 0.0}))
    with pytest.raises(UserError, match="process 1 on elsewhere"), owned(tmp_path):
        pass
    os.utime(lock, (time.time() - 2 * owner.STALE,) * 2)
    with owned(tmp_path):
        pass
    # a number that now is another process's
    lock.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "began": "1", "time": 0.0}))
    with owned(tmp_path):
        pass


@pytest.mark.parametrize("file_system", NO_LOCKS[:1], indirect=True)
def test_without_locks_an_owner_gives_signs_of_life(tmp_path, file_system, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.01)
    with owned(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 5
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_of_two_trainings_at_once_one_trains(tmp_path):
    go = tmp_path / "go"
    wait = f"""
import time
print(os.getpid())
before = trainer.Trainer.run
def late(*args):
    while not Path({str(go)!r}).exists():
        time.sleep(0.05)
    return before(*args)
trainer.Trainer.run = late
"""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(runs.train_in_process, tmp_path / "run", wait) for _ in range(2)]
        concurrent.futures.wait(both, timeout=200, return_when="FIRST_COMPLETED")
        go.touch()
    trained, refused = sorted((job.result() for job in both), key=lambda done: done.returncode)
    assert (trained.returncode, refused.returncode) == (0, 2), (trained, refused)
    pid = trained.stdout.split()[0]
    assert f"(process {pid} on {socket.gethostname()}, since " in refused.stderr and refused.stderr.count("\n") == 1
    assert runs.curve(tmp_path / "run")[-1]["step"] == runs.STEPS


# --- what is refused leaves nothing ---


def _with(section: str, **values):
    config = runs.tiny()
    return replace(config, **{section: replace(getattr(config, section), **values)})


REFUSED = {
    "weights that are not there": lambda: runs.tiny(init="/nowhere"),
    "data that is not there": lambda: _with("data", name="latents", path="/nowhere"),
    "a package that is not there": lambda: runs.tiny(wandb="project"),
    "a network that does not fit": lambda: _with("model", input_size=16),
    "a GPU's option": lambda: runs.tiny(cuda_graph=True),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("there", (False, True), ids=("new", "empty"))
def test_a_refused_run_leaves_nothing(tmp_path, monkeypatch, config, there):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "a" / "b"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(UserError):
        train(config(), out)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "a", out] if there else [])


FOREIGN = {
    "a text": lambda out: (out / "thesis.tex").write_text("\\end"),
    "a folder of images": lambda out: ((out / "n01440764").mkdir(), (out / "n01440764" / "a.jpg").touch()),
    "another config.json": lambda out: (out / "config.json").write_text('{"_class_name": "AutoencoderKL"}'),
    "a config.json that is no object": lambda out: (out / "config.json").write_text("[1]"),
}


@pytest.mark.parametrize("fill", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_something_else_is_refused(tmp_path, fill):
    fill(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="^out: got .*wanted an empty folder or a run's: this one holds "):
        train(runs.tiny(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_quickstart_refuses_a_folder_of_something_else(command, tmp_path):
    for refused in (["--data.name", "latents"], ["--train.batch", 4000]):
        code, _, err = command("quickstart", "--out", tmp_path / "made" / "out", *refused)
        assert code == 2 and err.count("\n") == 1 and not list(tmp_path.iterdir()), err
    (tmp_path / "thesis.tex").touch()
    code, _, err = command("quickstart", "--out", tmp_path)
    assert code == 2 and "this one holds thesis.tex" in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="^out: got .*which cannot be used"):
            train(runs.tiny(), out)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("script, before", {
    "train": ("digits",), "sample": ("RUN",), "convert": ("RUN",), "ablate": ("tangent",), "quickstart": (),
}.items())  # fmt: skip
@pytest.mark.parametrize("empty", (("--out", ""), ("--out=",)), ids=("two words", "one word"))
def test_an_empty_name_is_refused(command, tmp_path, monkeypatch, script, before, empty):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(script, *before, *empty)
    assert code == 2 and "--out" in err and "''" in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


# --- what a run says of its starts ---


def test_the_environment_lists_every_start(tmp_path):
    train(runs.tiny(steps=4), tmp_path)
    first = json.loads((tmp_path / "environment.json").read_text())
    assert [start["step"] for start in first["starts"]] == [0] and first["versions"] == first["starts"][0]["versions"]
    train(runs.tiny(steps=4), tmp_path)  # done: no start
    assert json.loads((tmp_path / "environment.json").read_text()) == first
    with pytest.raises(UserError):
        train(runs.tiny(steps=6, seed=1), tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text()) == first
    # of a run that was begun when one start alone was kept
    old = {name: value for name, value in first.items() if name != "starts"}
    (tmp_path / "environment.json").write_text(json.dumps(old | {"commit": "old"}))
    train(runs.tiny(steps=6), tmp_path)
    again = json.loads((tmp_path / "environment.json").read_text())
    assert [start["commit"] for start in again["starts"]] == ["old", first["commit"]]
    assert again["starts"][1]["step"] == 4 and again["commit"] == first["commit"]


# --- signals ---


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_signals_that_ask_a_run_to_stop(number):
    # what started the tests may have them ignore a hangup
    before = signal.signal(number, signal.default_int_handler)
    try:
        with stop_on_signal() as received:
            os.kill(os.getpid(), number)
            assert received == [number]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_hangup_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_takes_nothing_along():
    keyboard, terminal = pty.openpty()
    _leave([terminal])
    os.write(terminal, b"still there")
    assert os.read(keyboard, 5) == b"still"
    os.close(keyboard)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(terminal, b"gone")
    _leave([terminal])
    os.write(terminal, b"to nowhere")
    os.close(terminal)


# --- a cache's job ---

DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "half": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "no object": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_job_is_rebuilt_from_a_whole_manifest(tmp_path, damage):
    arrays = np.ones((2, 3, 4, 2, 2), np.float32)
    cache = caches.cache_of(tmp_path, *arrays, np.arange(3))
    before = caches.contents(cache)
    damage(cache / "job.json")
    Builder(cache, wanted := json.loads(before["job.json"])).begin()
    assert caches.contents(cache) == before
    # without a manifest nobody knows
    (cache / "manifest.json").unlink()
    damage(cache / "job.json")
    with pytest.raises(UserError):
        Builder(cache, wanted).begin()
