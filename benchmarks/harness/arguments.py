"""Types of arguments that the commands share, and the exit on bad input."""

import argparse
import math
import sys

import torch


class BadInput(SystemExit):
    """Bad input: one line on standard error, exit code 2."""

    def __init__(self, message: str):
        super().__init__(message)
        print(message, file=sys.stderr)
        self.code = 2


def finite(text: str) -> float:
    """Parse a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a finite number")
    return value


def available(name: str) -> str:
    """Parse a device: cpu, or cuda if torch sees a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "--device: got cuda, but torch sees no GPU, wanted one; --device cpu times it here, "
            "S/8 in a minute, XL/2 in hours"
        )
    return name


def positive(text: str) -> int:
    """Parse a positive whole number."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive whole number")
    return value
