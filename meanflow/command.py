"""How a command ends: its exit code, and one clear line instead of a traceback."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from .errors import TrainingStopped, UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a command and exit: 0 done, 1 training stopped, 2 bad input, 128 + n stopped by signal n."""
    prog = Path(sys.argv[0]).name
    report = threading.excepthook
    # TensorBoard's writer thread meets a full disk first; the next write of the main thread says so in one line
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
