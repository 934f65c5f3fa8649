"""Ways to run the same thing take turns; one that fails becomes a reason, and the others go on."""

import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

OUT_OF_MEMORY = "out of memory"
FEWEST = 3
"""Turns that are taken however long they last."""


def turns(repeats: int, seconds: float) -> Iterator[int]:
    """The numbers of the steps to take, while there is time: a slow machine gets fewer pairs, and not none."""
    begin = time.monotonic()
    for turn in range(repeats):
        if turn >= FEWEST and time.monotonic() - begin > seconds:
            return
        yield turn


class Reason(NamedTuple):
    """Why a variant has no time."""

    words: str
    failed: bool
    """Whether that is a mistake, and not the machine's or the workload's nature."""


def attempt(call: Callable) -> tuple[object, Reason | None]:
    """What ``call`` returns, or why it failed. The exception is not kept: it would keep the variant's memory."""
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
