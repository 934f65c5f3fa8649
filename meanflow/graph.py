"""A function of tensors, captured once in a CUDA graph and replayed: a GPU that waits for the host no longer does."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Inputs, Outputs = TypeVar("Inputs"), TypeVar("Outputs")


class Graph(Generic[Inputs, Outputs]):
    """``run``, captured with the shapes of ``inputs``; only the values of their tensors may change.

    Args:
        run: makes no other kernels than it made before, when it was called once to compile and load them.
        inputs: of any structure. pool: memory shared with other graphs that never run at the same time.

    What a call returns is overwritten by the next call, of any graph of the same pool.
    """

    def __init__(self, run: Callable[[Inputs], Outputs], inputs: Inputs, pool=None):
        self._inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating: one pins the next batches
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run(self._inputs)

    def __call__(self, inputs: Inputs) -> Outputs:
        for held, new in zip(pytree.tree_leaves(self._inputs), pytree.tree_leaves(inputs), strict=True):
            if isinstance(held, Tensor):
                held.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._outputs
