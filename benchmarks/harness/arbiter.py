"""Being alone on the GPU: the processes of a suite compile side by side, and one at a time is timed.

The suite gives each process that it starts an end of a socket (option ``--turns FD``). ``alone`` asks on it; the answer
comes when every other process of the suite has been stopped (SIGSTOP), and what had been queued on the GPU is waited
for. A process that ends, however it ends, gives its turn back. Outside of a suite nothing is asked and nobody waits.
"""

import argparse
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

ASK, GRANT, RELEASE, STOPPED = b"alone\n", b"go\n", b"done\n", b"stopped\n"
"""The words of a process and of the suite; STOPPED is answered by seconds."""
QUIET = 20
"""Round trips to the GPU in a row that must be short before it counts as idle."""
SHORT = 5e-4
"""Seconds of such a round trip at most. A GPU that others work on answers after their time slice, of milliseconds."""


class _Channel:
    """This process's way to the suite."""

    end: socket.socket | None = None
    held: int = 0
    """Number of nested ``alone`` that are open."""

    def ask(self, word: bytes) -> str:
        """Send a word and wait for the line that answers it.

        Raises:
            RuntimeError: the suite has ended.
        """
        self.end.sendall(word)
        answer = b""
        while not answer.endswith(b"\n"):
            received = self.end.recv(64)
            if not received:
                raise RuntimeError("--turns: the suite that gives the turns has ended; nothing more is timed")
            answer += received
        return answer.decode().strip()


_channel = _Channel()


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option by which a suite tells its processes where to ask."""
    parser.add_argument("--turns", type=int, metavar="FD", help=argparse.SUPPRESS)


def join(fd: int | None) -> None:
    """Take turns with the other processes of the suite from now on; without ``fd`` there are no others."""
    if fd is not None and _channel.end is None:
        _channel.end = socket.socket(fileno=fd)


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """A section in which no other process of the suite runs; on "cuda" it begins once the GPU is idle.

    Compile before it and time in it: while it is open all others wait. Sections may be nested.
    """
    if _channel.end is None or _channel.held:
        yield
        return
    _channel.ask(ASK)
    _channel.held += 1
    try:
        if device == "cuda":
            wait_until_idle(_round_trip)
        yield
    finally:
        _channel.held -= 1
        _channel.end.sendall(RELEASE)


def running_seconds() -> float:
    """A clock that stands still while this process is stopped."""
    now = time.monotonic()
    return now if _channel.end is None else now - float(_channel.ask(STOPPED))


def _round_trip() -> float:
    import torch

    begin = time.perf_counter()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def wait_until_idle(round_trip: Callable[[], float], limit: float = 20.0) -> None:
    """Wait until the GPU answers at once: what stopped processes had queued goes on without them.

    Args:
        round_trip: makes the GPU answer; the seconds that it took.

    Raises:
        RuntimeError: after ``limit`` seconds.
    """
    begin, quiet = time.monotonic(), 0
    while quiet < QUIET:
        quiet = quiet + 1 if round_trip() < SHORT else 0
        if time.monotonic() - begin > limit:
            raise RuntimeError(f"the GPU was not idle within {limit:g} s: another program uses it; nothing was timed")
