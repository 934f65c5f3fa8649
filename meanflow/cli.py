"""How the commands behave: options from dataclasses, and one clear line with exit code 2 for bad input."""

import contextlib
import io
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro
import tyro.constructors

from .errors import TrainingStopped, UserError

Options = TypeVar("Options")
CHECKED = tyro.constructors.ConstructorRegistry()
"""What every option of these types must be, whichever command it is of."""


@CHECKED.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """A float is finite."""

    def read(words: list[str]) -> float:
        value = float(words[0])
        if not math.isfinite(value):
            raise ValueError(f"got {words[0]!r}, wanted a finite number")
        return value

    return _spec("FLOAT", read, (int, float)) if info.type is float else None


@CHECKED.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """A path is not empty, which would mean this folder."""

    def read(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("got '', wanted a path")
        return Path(words[0])

    return _spec("PATH", read, Path) if info.type is Path else None


def _spec(metavar: str, read: Callable, kinds: type | tuple[type, ...]) -> tyro.constructors.PrimitiveConstructorSpec:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=read, is_instance=lambda value: isinstance(value, kinds),
        str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


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
            return tyro.cli(options, args=args, prog=prog, description=description, default=default, registry=CHECKED)
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
