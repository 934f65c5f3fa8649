"""Read labels as people store them: converted to whole numbers from 0 on if the meaning is certain, else refused."""

import re
from typing import NamedTuple

import numpy as np

from ..errors import UserError

LIMIT = 2**31  # labels are below it


class Label(NamedTuple):
    """A label, and what it was converted from if it was no whole number."""

    value: int
    converted: str | None


def read_label(value: object, name: str, hint: str = "correct the label") -> Label:
    """Read one label: a whole number, its digits as text, a float of that value, or a one-hot vector.

    Args:
        value: a number, text, a numpy array or a list.
        name: of the label, for the message.

    Raises:
        UserError: for anything else: fractions, NaN, negative numbers, names, nothing.
    """
    if type(value) is int:
        number, converted = value, None
    elif isinstance(value, (bytes, str)):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        text = text.strip()
        number, converted = (int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None), None
    else:
        number, converted = _number(value)
    if number is None or not 0 <= number < LIMIT:
        got = " ".join(repr(value).split())
        got = got if len(got) <= 60 else got[:57] + "..."
        raise UserError(f"source: got {name} = {got}, wanted a whole number from 0 on; {hint}")
    return Label(number, converted)


def _number(value: object) -> tuple[int | None, str | None]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):  # ragged lists, and what numpy does not know
        return None, None
    if array.size == 1 and array.dtype.kind in "iu":
        return int(array.item()), None
    if array.size == 1 and array.dtype.kind == "f":
        number = float(array.item())
        return (int(number), "labels stored as floats") if number.is_integer() else (None, None)
    one_hot = array.ndim == 1 and array.size > 1 and array.dtype.kind in "iufb"
    if one_hot and np.count_nonzero(array) == 1 and array[array.argmax()] == 1:
        return int(array.argmax()), "one-hot labels"
    return None, None
