"""Data of the coming steps, prepared ahead in a thread."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Hands out make(first), make(first + 1), ..., prepared ahead by a thread.

    Args:
        make: makes a step's data, any pytree. It runs in the thread, one call at a time.
        first: the step to begin with.
        depth: how many steps are kept ready.
        pin: put their tensors into pinned memory, in the thread too, so that a GPU copies them without waiting.
    """

    def __init__(self, make: Callable[[int], T], first: int, depth: int = 3, pin: bool = False):
        self.make, self.depth, self.pin = make, depth, pin
        self.wait_seconds = 0.0
        """Time spent in get() waiting for the thread."""
        # the current device belongs to a thread: without this every rank's thread would pin on GPU 0
        self._device = torch.cuda.current_device() if pin else None
        self._start(first)

    def get(self, step: int) -> T:
        """Return the data of a step; a step other than the next one restarts the thread there.

        Raises:
            whatever make raised for it, with its traceback; a second call tries again.
        """
        if step != self._next:
            self.close()
            self._start(step)
        start = time.perf_counter()
        made, error = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if error is not None:
            self._next = None  # the thread has ended
            raise error
        self._next = step + 1
        return made

    def close(self) -> None:
        """End the thread after its current call of make."""
        self._next = None
        self._stop.set()
        while self._thread.is_alive():
            # make room for a thread that waits for it
            while not self._ready.empty():
                self._ready.get()
            self._thread.join(0.01)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _start(self, first: int) -> None:
        self._next = first
        self._ready: queue.Queue = queue.Queue(self.depth)
        self._stop = threading.Event()
        args = (first, self._ready, self._stop)
        self._thread = threading.Thread(target=self._run, args=args, daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, step: int, ready: queue.Queue, stop: threading.Event) -> None:
        # more threads would compete with those of the step for the cores
        torch.set_num_threads(1)
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while not stop.is_set():
            try:
                made = self.make(step)
                if self.pin:
                    made = pytree.tree_map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x, made)
            except BaseException as error:  # raised again in get()
                ready.put((None, error))
                return
            ready.put((made, None))
            step += 1
