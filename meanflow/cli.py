"""How the commands behave: options from dataclasses, and one clear line with exit code 2 for bad input."""

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from .errors import TrainingStopped, UserError

Options = TypeVar("Options")


def parse(
    options: type[Options], args: list[str], *, prog: str, description: str, default: Options | None = None
) -> Options:
    """Command-line arguments as a dataclass of options.

    Raises:
        UserError: for an unknown option or a value that does not fit, in one line.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(options, args=args, prog=prog, description=description, default=default)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise UserError(_one_line(output.getvalue())) from None


def _one_line(message: str) -> str:
    """tyro's message box as one line: what is wrong, then the nearest option or the option's own line."""
    lines = [line.strip(" │╭╮╰╯") for line in message.splitlines()]
    sections, section = [], []
    for line in [*lines[1:], "-"]:  # the first line is the box's title
        if line.strip("-─"):
            section.append(line)
        elif section:
            sections.append(" ".join(section))
            section = []
    problem = re.sub(r"^Error parsing [\w.-]+: (?=[\w.]+: got)", "", sections[0])  # one of our own checks
    hints = (re.match(r"(?:Perhaps you meant|Argument helptext): (--\S+(?: [^a-z ]\S*)?)", s) for s in sections[1:])
    hint = next((f"; wanted {hint[1]}" for hint in hints if hint), "")
    return f"{problem}{hint}; see --help"


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
