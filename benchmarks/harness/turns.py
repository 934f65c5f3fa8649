"""Taking turns: how many turns the time allows, and the reason why a way could not be timed."""

import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

OUT_OF_MEMORY = "out of memory"
FEWEST = 3
"""Least number of turns, however long they last."""


def turns(repeats: int, seconds: float) -> Iterator[int]:
    """Count turns up to ``repeats``, but begin none after ``seconds``; at least FEWEST are taken."""
    begin = time.monotonic()
    for turn in range(repeats):
        if turn >= FEWEST and time.monotonic() - begin > seconds:
            return
        yield turn


class Reason(NamedTuple):
    """The reason why a variant has no time."""

    words: str
    failed: bool
    """True for a mistake; False if this machine or this workload cannot have a time."""


def attempt(call: Callable) -> tuple[object, Reason | None]:
    """Run ``call``: its result, or the reason why it failed. The exception is not kept: it would hold the memory."""
    try:
        found = call()
    except Exception as error:
        if out_of_memory(error):
            return None, Reason(OUT_OF_MEMORY, failed=False)
        traceback.print_exc()
        first = (str(error).strip() or "no message").splitlines()[0]
        return None, Reason(f"{type(error).__name__}: {first[:200]}", failed=True)
    return (None, found) if isinstance(found, Reason) else (found, None)


def out_of_memory(error: Exception) -> bool:
    # the trainer's step says it in words of its own
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in words or words.startswith("memory:")
