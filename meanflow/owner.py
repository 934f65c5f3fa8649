"""Locks on folders: one command writes to a folder at a time, and a refused one leaves nothing behind."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

LOCK = ".lock"
PATIENCE = 2.0
"""Seconds to wait for a lock: a killed process may take as long to disappear."""
BEAT, STALE = 30.0, 150.0
"""Seconds between two signs of life, and of silence until an owner counts as dead, on file systems without locks."""


@contextmanager
def owned(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other commands from writing to the folder within a with block; the folder is made if need be.

    patience: seconds to wait for another that has it.

    The lock is the kernel's (flock), which ends with its process, however that ends. The lock file names its owner, for
    the other's message. On a file system without locks the file alone counts: an owner that no longer runs on this
    machine, or has given no sign of life from another, stops nobody.

    Raises:
        UserError: where another process has it, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquire(folder, patience)
    except OSError as error:
        _remove_empty(made)
        raise UserError(
            f"out: got {str(folder)!r}, which cannot be used ({error}), wanted a writable folder; name another by --out"
        ) from None
    gone = threading.Event()
    if not file.locked:
        threading.Thread(target=_beat, args=(folder / LOCK, gone), daemon=True).start()
    try:
        yield
    finally:
        gone.set()
        # while it is held: nobody else can take what is about to go
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        _remove_empty(made)


class _File:
    """The open lock file, and whether the kernel locks it."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locked = True
        except OSError as error:
            self.locked = False
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise BlockingIOError from None

    def is_at(self, path: Path) -> bool:
        """Whether this is still the path's file: an owner may have removed it between its opening and its locking."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), path.stat())
        except FileNotFoundError:
            return False

    def write(self, text: str) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, text.encode(), 0)

    def close(self) -> None:
        os.close(self.descriptor)


def _acquire(folder: Path, patience: float) -> _File:
    path, end = folder / LOCK, time.monotonic() + patience
    while True:
        try:
            file = _File(path)
        except BlockingIOError:
            if time.monotonic() > end:
                raise _taken(folder, _holder(path)) from None
            time.sleep(0.1)
            continue
        if file.is_at(path):
            break
        file.close()
    if not file.locked and (holder := _holder(path)) and _lives(path, holder):
        file.close()
        raise _taken(folder, holder)
    me = {"host": socket.gethostname(), "process": os.getpid(), "began": _began(os.getpid()), "time": time.time()}
    file.write(json.dumps(me) + "\n")
    return file


def _holder(path: Path) -> dict:
    try:
        holder = json.loads(path.read_text())
        return holder if {"host", "process", "time"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):  # just begun, or gone
        return {}


def _lives(path: Path, holder: dict) -> bool:
    """Whether the named owner still runs, as far as can be known."""
    if holder["host"] != socket.gethostname():
        return time.time() - path.stat().st_mtime < STALE
    return os.path.exists(f"/proc/{holder['process']}") and _began(holder["process"]) == holder.get("began")


def _began(process: int) -> str | None:
    """Start time of a process in kernel ticks: a process number alone may have been reused."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _beat(path: Path, gone: threading.Event) -> None:
    while not gone.wait(BEAT):
        try:
            os.utime(path)
        except OSError:  # the next one may succeed
            continue


def _taken(folder: Path, holder: dict) -> UserError:
    who = ""
    if holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["time"]))
        who = f" (process {holder['process']} on {holder['host']}, since {since})"
    return UserError(
        f"out: got {folder}, which another process is writing to{who}, wanted a folder at rest; wait for it, or name "
        "another by --out"
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made, the innermost first, as long as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
