"""The errors a user can cause or must act on, each one clear line."""

import difflib
import math
from collections.abc import Collection
from dataclasses import fields


class UserError(ValueError):
    """Bad input: says the name, what it got, what it wanted and what to do. The commands exit with code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (a loss that is not finite). The commands exit with code 1."""


def require(condition: bool, name: str, got: object, wanted: str, hint: str) -> None:
    """Raise the one-line :class:`UserError` unless the condition holds."""
    if not condition:
        raise UserError(f"{name}: got {got!r}, wanted {wanted}; {hint}")


def nearest(name: str, known: Collection[str]) -> str:
    """The two known names closest to a name, joined by "and"."""
    return " and ".join(map(repr, difflib.get_close_matches(name, known, n=2, cutoff=0)))


def require_finite(options: object, section: str = "") -> None:
    """Raise if a number of a dataclass of options is infinite or NaN; section: prefix of the names in the message."""
    for field in fields(options):
        value = getattr(options, field.name)
        name = f"{section}.{field.name}" if section else field.name
        for each in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(each, float) or math.isfinite(each)
            require(finite, name, value, "a finite number", "change it")
