"""The captured step against the plain one, alone and in a process group; without a GPU, by a graph's stand-in."""

import copy
import gc
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
import torch
from ranks import started_by_torchrun
from steps import assert_same_steps, config, steps_of
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from meanflow.errors import UserError
from meanflow.training import step as step_module
from meanflow.training.engine import capture_if_possible
from meanflow.training.step import Step
from meanflow.training.trainer import Trainer
from meanflow.world import World

CAPTURED = {  # the preset, compiled, over NCCL in a group of one, micro-batches
    "eager": ("digits", False, False, 1),
    "compiled": ("digits", True, False, 1),
    "improved": ("digits-imf", False, False, 1),
    "accumulated": ("digits", False, False, 2),
    "in a group of one": ("digits", False, True, 1),
    "compiled in a group of one": ("digits", True, True, 1),
    "accumulated in a group of one": ("digits", False, True, 2),
}


@contextmanager
def world_of_graphs():
    with World("cuda") as world:
        try:
            yield world
        finally:
            # whatever failed: NCCL would wait for them
            for step in (x for x in gc.get_objects() if type(x) is Step):
                step.drop_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("name, compiled, connected, accumulate", CAPTURED.values(), ids=CAPTURED)
def test_captured_step_is_the_plain_step(name, compiled, connected, accumulate, tmp_path, monkeypatch):
    run = config(name=name, device="cuda", compile=compiled, accumulate=accumulate)
    plain, a = steps_of(run, tmp_path / "plain", 12)
    if connected:
        started_by_torchrun(monkeypatch)
    with world_of_graphs() as world:
        run = replace(run, train=replace(run.train, cuda_graph=True))
        captured, b = steps_of(run, tmp_path / "captured", 12, world)
        assert len(b.make_step._graphs) == len(b.objective.declared)
        assert_same_steps(captured, plain, 1e-5)
        assert_same_moments(a, b)
        if accumulate == 1 and not connected:
            assert_gradients_are_lent(b)


def assert_same_moments(a, b):
    # weights and averages are not compared: no loss depends on the bias of k, whose gradient is what rounding left of 0
    # (4e-10 of 2e-2), and Adam divides it by its own size: each step moves such a weight by the whole rate, either way
    first, second = (
        torch.cat([trainer.optimizer.state[p]["exp_avg"].flatten() for p in trainer.net.parameters()])
        for trainer in (a, b)
    )
    assert (first - second).norm() <= 1e-4 * first.norm()


def assert_gradients_are_lent(trainer):
    """They own no memory of the graphs' pool, and outlive the graphs all the same."""
    gradient = next(trainer.net.parameters()).grad
    wanted = gradient.clone()
    before = torch.cuda.memory_allocated()
    trainer.optimizer.zero_grad()
    assert torch.cuda.memory_allocated() == before
    trainer.make_step._graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.full((2**24,), 7.0, device="cuda")
    assert torch.equal(gradient, wanted)


def spoil(tensors):
    for x in tensors:
        if x.is_floating_point():
            x.detach().fill_(float("nan"))


class Replay:
    """What a CUDA graph does, without a GPU: capturing changes no value; a call computes and runs none of the step's
    Python, so that it assigns no gradient; what another graph of the pool had left or returned is gone."""

    def __init__(self, trainer):
        self.trainer, self.params = trainer, list(trainer.net.parameters())
        self.graphs, self.returned = [], []

    def gradients(self):
        return [p.grad for p in self.params]

    def begin(self):
        # those of the eager step are outside of the graphs' memory
        self.outside = self.gradients()

    def assign(self, gradients):
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient

    def __call__(self, run, inputs, pool):
        trainer, lent, captured_with = self.trainer, [], self.gradients()
        states = [x for state in trainer.optimizer.state.values() for x in state.values()]
        held = [*self.params, *trainer.ema.parameters(), *states, *trainer.guard.state().values(), *self.outside]
        before = [x.detach().clone() for x in held]
        run(inputs)
        memory = {x.data_ptr() for x in self.outside}
        spoil(x for x in self.gradients() if x.data_ptr() not in memory)
        with torch.no_grad():
            torch._foreach_copy_(held, before)
        self.graphs.append(lent)

        def replay(inputs):
            inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
            spoil(self.returned)
            assigned = self.gradients()
            self.assign(captured_with)
            done = run(inputs)
            for other in self.graphs:
                spoil(other)
            if lent:
                torch._foreach_copy_(lent, self.gradients())
            self.assign(assigned)
            self.returned = [x for x in pytree.tree_leaves(done) if isinstance(x, torch.Tensor)]
            return done

        replay.lend = lambda x: lent.append(torch.full_like(x, float("nan"))) or lent[-1]
        return replay


@pytest.mark.parametrize("accumulate", [1, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("connected", [False, True], ids=["alone", "in a group of one"])
def test_a_captured_step_leaves_its_own_gradient(connected, accumulate, tmp_path, monkeypatch):
    """Of every size, from the first step on."""
    run = config(accumulate=accumulate)
    plain = Trainer(run, tmp_path / "plain")
    if connected:
        started_by_torchrun(monkeypatch)
    with World("cpu") as world:
        captured = Trainer(run, tmp_path / "captured", world)
        run = replace(run, train=replace(run.train, cuda_graph=True))
        make_step = Step(run, captured.make_step.loss, captured.optimizer, captured.objective, captured.guard)
        assert isinstance(make_step.loss, DistributedDataParallel) == connected
        graphs = Replay(captured)
        monkeypatch.setattr(step_module, "Graph", graphs)
        monkeypatch.setattr(step_module, "on_capture_stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", graphs.begin)
        sizes = set()
        for step in range(12):
            micro_batches = plain.inputs(step)
            if step == 5:  # left out by all
                micro_batches[0].batch.mean.fill_(float("nan"))
            sizes |= {(len(inputs.plan.rows), inputs.plan.tangent_start) for inputs in micro_batches}
            wanted, done = plain.make_step(*micro_batches), make_step(*micro_batches)
            for got, terms in zip(done.terms, wanted.terms, strict=True):
                assert_equal((got.raw, got.du_dt), (terms.raw, terms.du_dt))
            for p, wanted in zip(captured.net.parameters(), plain.net.parameters(), strict=True):
                assert_equal(p.grad, wanted.grad)
                assert torch.equal(p, wanted)
        assert_equal(captured.guard.state(), plain.guard.state())
        assert plain.guard.findings().skipped == 1
        assert len(sizes) > 2 and len(graphs.graphs) >= accumulate * len(sizes)


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("parallel, backend", [("ddp", "nccl"), ("zero1", "nccl"), ("ddp", "gloo"), ("fsdp", "nccl")])
def test_what_cannot_be_captured_runs_uncaptured(parallel, backend, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    world = SimpleNamespace(connected=True, device=torch.device("cuda"), is_main=True)
    found = capture_if_possible(runs.tiny(cuda_graph=True, parallel=parallel), world)
    said = capsys.readouterr().out
    assert found.train.cuda_graph == (not said) == (parallel != "fsdp" and backend == "nccl")
    if said:
        assert f"train.cuda_graph: got True with train.parallel {parallel} over {backend}, wanted" in said
        assert said.count("\n") == 1


def test_capturing_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="train.cuda_graph: got True, wanted a GPU"):
        Trainer(runs.tiny(cuda_graph=True), tmp_path)


def planned_sizes(trainer, captured):
    train = replace(trainer.config.train, cuda_graph=captured)
    trainer.config = replace(trainer.config, train=train)
    plans = [inputs.plan for position in range(8) for inputs in trainer.inputs(position)]
    return [(len(plan.tangent), len(plan.rows)) for plan in plans]


@pytest.mark.parametrize("name", ["digits", "digits-imf"])
def test_processes_of_a_captured_step_take_one_size(name, tmp_path):
    run = config({"equal_placement": "bernoulli"}, name=name, batch=64, accumulate=4)
    first = Trainer(run, tmp_path)
    # the same four micro-batches, two of each of two processes
    second = copy.copy(first)
    for rank, trainer in enumerate((first, second)):
        trainer.world, trainer.micro_batches = SimpleNamespace(rank=rank, size=2), range(rank, 4, 2)
    apart = [planned_sizes(trainer, False) for trainer in (first, second)]
    together = [planned_sizes(trainer, True) for trainer in (first, second)]
    assert apart[0] != apart[1] and together[0] == together[1]
    for (tangent, rows), *alone in zip(together[0], *apart, strict=True):
        # a larger derivative may ask for more rows
        assert tangent == max(x for x, _ in alone) and rows >= max(y for _, y in alone)
