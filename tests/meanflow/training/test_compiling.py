"""Compiling in several processes: one of a machine compiles, the others load."""

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import CppBuilder
from torch.nn.parallel import DistributedDataParallel

from meanflow.training import parallel
from meanflow.training.engine import compile_loss


class Objective(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return x.sum()


def compiled(rank: int, cache: str, width: int) -> Counter:
    """What came out of caches when an objective was compiled in turn, and how often a C++ compiler ran."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    counters.clear()
    torch.manual_seed(0)
    loss = Objective(width)
    built, build = [], CppBuilder.build
    with (
        mock.patch.object(CppBuilder, "build", lambda self: built.append(self.get_target_file_path()) or build(self)),
        # it would compile a program for each kind of vectors, to see whether it can
        torch._inductor.config.patch({"cpp.vec_isa_ok": True}),
    ):
        compile_loss(loss)
        loss = parallel.replicate(loss)
        with parallel.compiling_in_turn(loss):
            loss(torch.randn(4, width)).backward()
    return (
        Counter(counters["aot_autograd"])
        + Counter(counters["inductor"])
        + Counter({"built": sum(name.endswith(".so") for name in built)})
    )


@pytest.mark.slow
@pytest.mark.parametrize(("width", "cache"), [(8, "autograd"), (512, "fxgraph")], ids=["whole", "cut"])
def test_the_second_process_loads_what_the_first_compiled(ranks, tmp_path, width, cache):
    """DDP cuts behind the first MB of weights; of such a graph AOTAutograd keeps nothing, and Inductor what it made."""
    first, second = ranks(compiled, str(tmp_path), width)
    missed, hit = f"{cache}_cache_miss", f"{cache}_cache_hit"
    assert first["built"] > 0 and first[missed] > 0
    assert second["built"] == second[missed] == 0 and second[hit] == first[missed]


def in_turn(rank: int, folder: str) -> tuple[list, bool]:
    """Two blocks in turn: what each process found written by the others, and whether gradients stayed its own."""
    loss = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    found = []
    for block in "ab":
        with parallel.compiling_in_turn(loss):
            found.append(sorted(path.name for path in Path(folder).iterdir()))
            loss(torch.full((1, 2), rank + 1.0)).sum().backward()
            Path(folder, f"{block}{rank}").touch()
    return found, bool((loss.module.weight.grad == 2 * (rank + 1)).all())


def test_the_first_process_of_a_machine_goes_first(ranks, tmp_path):
    (first, own), (second, others) = ranks(in_turn, str(tmp_path))
    assert own and others
    assert first[0] == [] and {"a0"} <= set(second[0]) and {"a0", "b0", "a1"} <= set(second[1])


def test_a_single_process_does_not_wait():
    with parallel.compiling_in_turn(nn.Linear(2, 1)):
        pass
