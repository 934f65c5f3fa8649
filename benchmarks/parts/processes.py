"""A command and all processes that it starts: stopped, woken and ended as one, with the time that they ran."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

PROC = Path("/proc")
STOPPING = 5.0
"""Seconds that stopped processes are given to come to rest."""
ENDING = 30.0
"""Seconds that killed ones are given to go."""


def family(root: int) -> dict[int, str]:
    """The state of each process that is ``root``, of its session or descended from it, as Linux abbreviates states."""
    parents, states, found = {}, {}, set()
    for path in PROC.iterdir():
        if not path.name.isdigit():
            continue
        try:
            # the name in front may hold anything, blanks and brackets too
            state, parent, _, session, *_ = (path / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        pid = int(path.name)
        parents[pid], states[pid] = int(parent), state
        if pid == root or int(session) == root:
            found.add(pid)
    while children := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= children
    return {pid: states[pid] for pid in found}


class Process:
    """A running command.

    Args:
        command: program and arguments; "{turns}" in them becomes the number of its end of the socket.
        log: what it prints goes there. folder: it works in. env: its environment.
    """

    def __init__(self, command: list[str], log: Path, folder: Path, env: dict[str, str]):
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        with theirs, log.open("w") as out:
            command = [word.replace("{turns}", str(theirs.fileno())) for word in command]
            out.write(" ".join(command) + "\n")
            out.flush()
            self._process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                # a session of its own, so that what it started is known as its
                start_new_session=True, preexec_fn=_end_with_parent, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self.pid = self._process.pid
        self.begin, self._stopped_at, self.stopped_seconds = time.monotonic(), None, 0.0

    @property
    def seconds(self) -> float:
        """Seconds that it has run, without those in which it was stopped."""
        now = self._stopped_at or time.monotonic()
        return now - self.begin - self.stopped_seconds

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Stop all of it; returns when none of it runs any more."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        while time.monotonic() - self._stopped_at < STOPPING:
            # again and again: one may have been started in between
            running = [pid for pid, state in family(self.pid).items() if state not in "TtZX"]
            if not running:
                return
            _send(running, signal.SIGSTOP)
            time.sleep(0.002)

    def wake(self) -> None:
        """Let all of it go on."""
        if self._stopped_at is not None:
            self.stopped_seconds += time.monotonic() - self._stopped_at
            self._stopped_at = None
            _send(family(self.pid), signal.SIGCONT)

    def end(self) -> None:
        """Kill all of it, stopped or not."""
        begin = time.monotonic()
        # a GPU's driver takes its time to free what a process held
        while time.monotonic() - begin < ENDING:
            running = [pid for pid, state in family(self.pid).items() if state not in "ZX"]
            if not running:
                break
            _send(running, signal.SIGKILL)
            time.sleep(0.002)
        self._process.wait()
        self.socket.close()


def _send(pids, number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _end_with_parent() -> None:
    """Ask Linux to end this process when the suite is killed: nothing is timed beside what a killed run left."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
