"""The schedule of the suite: parts run side by side while they compile, and one alone while it is timed."""

import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..harness.arbiter import ASK, GRANT, RELEASE, STOPPED
from .catalogue import Part
from .processes import Process

TICK = 0.02
"""Seconds between two looks at what has ended."""
PASSED, FAILED, LATE, SKIPPED = "passed", "failed", "out of time", "skipped"


class Ended(NamedTuple):
    """How a part ended."""

    outcome: str
    seconds: float
    """Seconds that it ran, without those in which it was stopped."""
    why: str | None = None
    """The reason in words, if its log does not give it."""


@dataclass
class Schedule:
    """Runs parts, the first ones first, as far as places, memory and time go.

    While a part is timed all others are stopped and none is begun. A part that is stopped spends nothing of its limit.
    One that ends, or is killed, while it was being timed wakes the others.
    """

    parts: list[Part]
    start: Callable[[Part], Process]
    ended: Callable[[Part, Ended], None]
    """Called with each part of ``parts`` once."""
    outcomes: dict[str, str]
    """Outcomes of parts that have ended, by name; the schedule adds to them."""
    places: int
    """Parts that run side by side at most."""
    memory: float
    """GiB that they may take together."""
    deadline: float = float("inf")
    """On the clock of time.monotonic: running parts are ended then, waiting ones are not begun."""
    running: dict[str, tuple[Part, Process]] = field(default_factory=dict)
    asking: list[str] = field(default_factory=list)
    """Names of the parts that want to be timed, in the order in which they asked."""
    timed: str | None = None
    """The name of the part that is being timed."""

    def run(self) -> None:
        """Run every part to its end."""
        self.waiting, self.names = list(self.parts), {part.name for part in self.parts}
        try:
            while self.waiting or self.running:
                if time.monotonic() > self.deadline:
                    self._out_of_time()
                    return
                self._skip()
                self._begin()
                self._listen()
                self._collect()
                self._grant()
        finally:
            for _, process in self.running.values():
                process.end()

    def _say(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    def _end(self, part: Part, ended: Ended) -> None:
        self.outcomes[part.name] = ended.outcome
        self.ended(part, ended)

    def _out_of_time(self) -> None:
        for part, process in list(self.running.values()):
            self._finish(part, process, LATE, "the time of all parts was over: the same command again goes on")
        for part in self.waiting:
            self._end(part, Ended(LATE, 0, "no time was left: the same command again goes on"))

    def _lacking(self, names: tuple[str, ...]) -> str | None:
        """One of ``names`` that ended without passing."""
        return next((name for name in names if self.outcomes.get(name, PASSED) != PASSED), None)

    def _skip(self) -> None:
        """Leave out what needs a part that did not pass, and end what may not be timed any more."""
        for part in list(self.waiting):
            if name := self._lacking(part.after + part.tests):
                self.waiting.remove(part)
                self._end(part, Ended(FAILED, 0, f"{name} did not pass: nothing of this was timed"))
        for part, process in list(self.running.values()):
            if name := self._lacking(part.tests):
                self._finish(part, process, FAILED, f"{name} did not pass: nothing of this was timed")

    def _open(self, names: tuple[str, ...]) -> bool:
        """True if all of ``names`` have ended or are not to run."""
        return not any(name not in self.outcomes and name in self.names for name in names)

    def _fits(self, part: Part) -> bool:
        used = sum(other.gib for other, _ in self.running.values())
        return not self.running or (len(self.running) < self.places and used + part.gib <= self.memory)

    def _begin(self) -> None:
        if self.timed:
            return
        for part in list(self.waiting):
            last = not part.again or not (self.running or any(not other.again for other in self.waiting))
            if last and self._open(part.after) and self._fits(part):
                self.waiting.remove(part)
                self._say(f"{part.name}: python {part.command}")
                self.running[part.name] = part, self.start(part)

    def _listen(self) -> None:
        """Take what the parts say for as long as a tick."""
        names = {process.socket: name for name, (_, process) in self.running.items()}
        for ready in select.select(names, [], [], TICK)[0]:
            name, process = names[ready], self.running[names[ready]][1]
            for word in ready.recv(1 << 12).splitlines(keepends=True):
                if word == ASK:
                    self.asking.append(name)
                elif word == RELEASE and name == self.timed:
                    self._release()
                elif word == STOPPED:
                    ready.send(f"{process.stopped_seconds}\n".encode())

    def _grant(self) -> None:
        """Give the first that asked, and may be timed, its turn."""
        if self.timed:
            return
        name = next((name for name in self.asking if self._open(self.running[name][0].tests)), None)
        if name is None:
            return
        self.asking.remove(name)
        self.timed = name
        for other, (_, process) in self.running.items():
            if other != name:
                process.stop()
        process = self.running[name][1]
        process.wake()
        process.socket.send(GRANT)

    def _release(self) -> None:
        """End the turn; the others go on unless the next turn begins at once."""
        self.timed = None
        self._grant()
        if self.timed is None:
            for _, process in self.running.values():
                process.wake()

    def _collect(self) -> None:
        """See which parts have ended, or run too long."""
        for part, process in list(self.running.values()):
            code = process.poll()
            if code is not None:
                self._finish(part, process, PASSED if code == 0 else FAILED)
            elif process.seconds > part.limit:
                self._finish(part, process, LATE, f"it ran {part.limit:g} s, its limit")

    def _finish(self, part: Part, process: Process, outcome: str, why: str | None = None) -> None:
        process.end()
        del self.running[part.name]
        self.asking = [name for name in self.asking if name != part.name]
        if self.timed == part.name:
            self._release()
        self._end(part, Ended(outcome, process.seconds, why))
