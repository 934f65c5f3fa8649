"""A function of tensors, captured once as a CUDA graph and replayed, which removes the host's launch overhead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

In = TypeVar("In")
Out = TypeVar("Out")


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def on_capture_stream() -> Iterator[None]:
    """Run on the stream that the current device's graphs are captured on, after what runs already, before the rest.

    What remembers a stream, as DDP's hooks do, must be made and warmed up on it, or a capture would leave it.
    """
    outside, stream = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


class Graph(Generic[In, Out]):
    """``run``, captured with the shapes of ``inputs``; only the values of their tensors may change.

    Args:
        run: already called once with these shapes, so that nothing is compiled or loaded during capture.
        inputs: of any structure. pool: memory shared with other graphs that never run at the same time.

    What a call returns is overwritten by the next call, of any graph of the same pool.
    """

    def __init__(self, run: Callable[[In], Out], inputs: In, pool=None):
        self._inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(torch.cuda.current_device())
        # other threads may go on: one pins the next batches, NCCL's asks for events
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = run(self._inputs)

    def __call__(self, inputs: In) -> Out:
        for held, new in zip(pytree.tree_leaves(self._inputs), pytree.tree_leaves(inputs), strict=True):
            if isinstance(held, Tensor):
                held.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def lend(self, x: Tensor) -> Tensor:
        """Return a tensor on the memory of x, which ``run`` made and held at its end, without owning that memory.

        Once x is gone, graphs captured later reuse that memory, so that a pool is as large as the largest graph, not as
        the sum of all. Until one of them is called, the tensor holds what this graph wrote; none of them may read it.
        The graph lives as long as the tensor.
        """
        memory = _Memory(x, self._graph)
        return torch.as_tensor(memory, device=x.device).view(x.dtype).as_strided(x.shape, x.stride())


class _Memory:
    """A tensor's memory as the CUDA array interface describes it, for torch.as_tensor."""

    def __init__(self, x: Tensor, owner: torch.cuda.CUDAGraph):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        # torch keeps this object while it has a tensor of it
        self.owner = owner
        self.__cuda_array_interface__ = {
            "version": 2,
            "data": (x.data_ptr(), False),
            # bytes: the interface knows no bfloat16
            "typestr": "|u1",
            "shape": (elements * x.element_size(),),
        }
