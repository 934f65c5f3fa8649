"""What the coming steps need, made ahead in a thread."""

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
    """Hands out make(first), make(first + 1), ..., made ahead by a thread.

    Args:
        make: a step's data, any pytree. It runs in the thread, one call at a time.
        first: the step it begins with.
        depth: how many are kept ready.
        pin: put their tensors into pinned memory, in the thread too, so that a GPU copies them without waiting.
    """

    def __init__(self, make: Callable[[int], T], first: int, depth: int = 3, pin: bool = False):
        self.make, self.depth, self.pin = make, depth, pin
        self.wait_seconds = 0.0
        """Spent in get() waiting for the thread."""
        # the current device is a thread's own: without this every rank's thread would pin on GPU 0
        self._device = torch.cuda.current_device() if pin else None
        self._start(first)

    def get(self, step: int) -> T:
        """The data of a step. Another step than the next one begins anew there.

        Raises:
            whatever make raised for it, with its traceback; asking again tries again.
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
        """End the thread, after the call of make that it is in."""
        self._next = None
        self._stop.set()
        while self._thread.is_alive():
            # a thread that waits for room must find it
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
        # torch's threads of this thread would fight for the cores with those of the step
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
