"""Compiling in several processes: one of a machine compiles, the others load."""

import os
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import runs
import torch
from ranks import Ranks
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import CppBuilder
from torch.nn.parallel import DistributedDataParallel

from meanflow.training.parallel import compiling_in_turn
from meanflow.training.trainer import train


@pytest.fixture
def ranks():
    processes = Ranks()
    yield processes
    processes.stop()


def one_step(rank: int, folder: str, options: dict) -> dict:
    """Train a step; what of its graphs came out of a cache, and how often a C++ compiler ran."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "cache"))
    counters.clear()
    built, build = [], CppBuilder.build
    with mock.patch.object(CppBuilder, "build", lambda self: built.append(self) or build(self)):
        train(runs.tiny(steps=1, sample_every=9, compile=True, **options), Path(folder, "run"))
    return Counter(counters["aot_autograd"]) + Counter({"built": len(built)})


@pytest.mark.slow
def test_the_second_process_loads_what_the_first_compiled(ranks, tmp_path):
    first, second = ranks(one_step, str(tmp_path), {"parallel": "ddp"})
    assert first["built"] > 0 and first["autograd_cache_miss"] > 0
    assert second["built"] == second["autograd_cache_miss"] == second["autograd_cache_bypass"] == 0
    assert second["autograd_cache_hit"] == first["autograd_cache_miss"]


def in_turn(rank: int, folder: str) -> tuple[list, bool]:
    """Two blocks in turn: what each process found written by the others, and whether gradients stayed its own."""
    loss = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    found = []
    for block in "ab":
        with compiling_in_turn(loss):
            found.append(sorted(path.name for path in Path(folder).iterdir()))
            loss(torch.full((1, 2), rank + 1.0)).sum().backward()
            Path(folder, f"{block}{rank}").touch()
    return found, bool((loss.module.weight.grad == 2 * (rank + 1)).all())


def test_the_first_process_of_a_machine_goes_first(ranks, tmp_path):
    (first, own), (second, others) = ranks(in_turn, str(tmp_path))
    assert own and others
    assert first[0] == [] and {"a0"} <= set(second[0]) and {"a0", "b0", "a1"} <= set(second[1])


def test_a_single_process_does_not_wait():
    with compiling_in_turn(nn.Linear(2, 1)):
        pass
