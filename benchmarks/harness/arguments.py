"""What the command lines of the benchmarks share: numbers that are some, and the end of bad input."""

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
    """A number of the command line that is neither infinite nor nan."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a finite number")
    return value


def available(name: str) -> str:
    """cpu, or a cuda that torch sees."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "--device: got cuda, but torch sees no GPU, wanted one; --device cpu times it here, "
            "S/8 in a minute, XL/2 in hours"
        )
    return name


def positive(text: str) -> int:
    """A positive whole number of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive whole number")
    return value
