"""Command lines: options from dataclasses, and one clear line with exit code 2 for bad input."""

import contextlib
import io
import re
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import tyro
import tyro.constructors

from .command import run
from .errors import UserError, require_finite

__all__ = ["parse", "run"]

Options = TypeVar("Options")
CHECKED = tyro.constructors.ConstructorRegistry()
"""Rules for the values of options, by type, shared by all commands."""


@CHECKED.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Refuse an empty path, which would mean this folder."""

    def read(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("got '', wanted a path")
        return Path(words[0])

    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=read, is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


@CHECKED.primitive_rule
def _choice(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Show choices that contain commas with separators between them."""
    choices = get_args(info.type) if get_origin(info.type) is Literal else ()
    if not any("," in str(choice) for choice in choices):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="{" + " | ".join(choices) + "}", instance_from_str=lambda words: words[0],
        is_instance=lambda value: value in choices, str_from_instance=lambda value: [value], choices=choices,
    )  # fmt: skip


def parse(
    options: type[Options], args: list[str], *, prog: str, description: str | None, default: Options | None = None
) -> Options:
    """Parse command-line arguments into a dataclass of options.

    Raises:
        UserError: for an unknown option or a value that does not fit, in one line.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            found = tyro.cli(options, args=args, prog=prog, description=description, default=default, registry=CHECKED)
    except SystemExit as exit:
        if not exit.code:
            raise  # --help
        raise UserError(_one_line(output.getvalue())) from None
    require_finite(found)
    return found


def _one_line(message: str) -> str:
    """Reduce tyro's message box to one line: what is wrong, then the nearest option or the option's own line."""
    lines = [line.strip(" │╭╮╰╯") for line in message.splitlines()]
    sections, section = [], []
    for line in [*lines[1:], "-"]:  # the first line is the box's title
        if line.strip("-─"):
            section.append(line)
        elif section:
            sections.append(" ".join(section))
            section = []
    problem = re.sub(r"^Error parsing [\w.-]+: (?=[\w.]+: got)", "", sections[0])  # one of our own checks
    option = re.compile(r"(?:Perhaps you meant|Argument helptext): (--\S+(?: (?:\[[A-Z. \[\]]+\]|[^a-z ]\S*))?)")
    hints = (option.match(section) for section in sections[1:])
    hint = next((f"; wanted {hint[1]}" for hint in hints if hint), "")
    return f"{problem}{hint}; see --help"
