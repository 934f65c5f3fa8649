"""How a command runs: its exit code, one clear line instead of a traceback, signals, signs of life."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from .errors import TrainingStopped, UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a command and exit: 0 done, 1 training stopped, 2 bad input, 128 + n stopped by signal n."""
    prog = Path(sys.argv[0]).name
    report = threading.excepthook
    # TensorBoard's writer thread meets a full disk first; the main thread's next write reports it in one line
    threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else report(failed)
    try:
        code = main(sys.argv[1:])
    except (UserError, TrainingStopped) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        code = 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        else:
            print(
                f"{prog}: error: {error}; make room or name a writable folder, and repeat the command", file=sys.stderr
            )
            code = 2
    sys.exit(code)


@contextmanager
def stop_on_signal():
    """Let SIGINT, SIGTERM and SIGHUP ask a loop to stop after its step: yields a list that then holds their numbers.

    A SIGHUP that was ignored at the start (nohup) stays ignored.
    """
    received: list[int] = []
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    # under torchrun each signal may come twice, and torchrun itself ends what does not end
    alone = "RANK" not in os.environ

    def note(number, frame):
        received.append(number)
        if number == signal.SIGHUP:
            _leave(terminals)
        if len(received) == 1:
            if alone or os.environ["RANK"] == "0":
                hint = "; a second one stops at once" if alone else ""
                print(f"\n{signal.Signals(number).name}: stopping after this step{hint}", flush=True)
        elif alone:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(terminals: list[int]) -> None:
    """Send the output for terminals that are gone to the null device: an error there would cost the checkpoint."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextmanager
def heartbeat(what: str, every: float = 10.0):
    """Print every so many seconds that something long is still at work, and at its end how long it took."""
    start, done = time.perf_counter(), threading.Event()

    def beat():
        while not done.wait(every):
            print(f"{what}: {time.perf_counter() - start:.0f} s ...", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    print(f"{what}: done in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
