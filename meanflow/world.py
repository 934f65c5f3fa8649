"""The processes of a run: those that torchrun started, or a single one."""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others, which may still compile or write a checkpoint; then it ends."""


def choose_device(name: str) -> torch.device:
    """Choose the device for "auto", "cpu" or "cuda"; several processes on a machine get one GPU each.

    Raises:
        UserError: for a GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: got 'cuda', but torch sees no GPU, wanted one; take auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"torchrun: got process {local + 1} on a machine of {count} GPU(s), wanted one GPU a process; "
            f"start it with --nproc-per-node {count}"
        )
    return torch.device("cuda", local) if "LOCAL_RANK" in os.environ else torch.device("cuda")


def fresh_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A store prefix unique to this launch. A collective call.

    torchrun keeps its store when it restarts processes, and in it the addresses of those that died.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"hello/{rank}", me)
        # a key of this launch alone
        store.wait([f"welcome/{me}"], TIMEOUT)
        name = store.get(f"welcome/{me}").decode()
        store.set(f"{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    name, missing, greeted = uuid.uuid4().hex, set(range(1, size)), {}
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"processes {sorted(missing)} of {size} did not come")
        for other in sorted(missing):
            if store.check([f"hello/{other}"]) and greeted.get(other) != (it := store.get(f"hello/{other}").decode()):
                greeted[other] = it
                store.set(f"welcome/{it}", name)
            if store.check([f"{name}/{other}"]):
                missing.discard(other)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


class World:
    """This process among the others. A context manager: leaving it ends the connection.

    Processes that torchrun started are connected, a single one too: what several do can be tried with one.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: for a GPU that is not there.
    """

    def __init__(self, device: str = "auto"):
        self.device = choose_device(device)
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.host_group: Any = None
        self.checkpoint_group: Any = None
        self._pending: tuple[Tensor, dist.Work] | None = None
        self.connected = self.size > 1 or dist.is_torchelastic_launched()
        """Whether there is a process group, be it of one."""
        self._own = self.connected and not dist.is_initialized()
        if self.connected:
            self._connect()

    def _connect(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self._own:
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = fresh_store(store, rank, size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        # separate groups: the host's collectives must not wait for the GPU, nor mix with a checkpoint's thread
        self.host_group, self.checkpoint_group = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, *_) -> None:
        # after a failure the others may be gone: nothing to wait for, as NCCL would even to end
        if self._own and dist.is_initialized() and (kind is None or self.device.type == "cpu"):
            if kind is None:
                dist.barrier(self.host_group)
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what one process writes."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return the first process's value, small and picklable, in all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    def gather(self, value: Any) -> list:
        """Return the values of all processes, in all of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def first_error(self, check: Callable[[], object], *, main_only: bool = False) -> UserError | None:
        """Run a check in each process, or in the main one alone; return the first error, in all processes."""
        mine = None
        try:
            if self.is_main or not main_only:
                check()
        except UserError as error:
            mine = error
        return next((error for error in self.gather(mine) if error is not None), None)

    def agree(self, check: Callable[[], object], *, main_only: bool = False) -> None:
        """Call a function that may raise a UserError: all processes go on, or all raise."""
        error = self.first_error(check, main_only=main_only)
        if error is not None:
            raise error

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, on the tensor's device; x itself in a process alone."""
        if self.connected:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def poll_stop(self, mine: bool) -> bool:
        """Whether any process passed True at the previous call. One call late, so that no process blocks.

        A single process gets its own answer at once.
        """
        if self.size == 1:
            return mine
        wanted = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            wanted = bool(flag)
        flag = torch.tensor(float(mine))
        self._pending = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.host_group, async_op=True)
        return wanted
