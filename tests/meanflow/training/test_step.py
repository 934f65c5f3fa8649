"""The step compiled and captured against the plain one, the optimizer's implementations, and failures explained."""

import copy
import functools
import gc
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import fresh
import pytest
import runs
import torch
from ranks import started_by_torchrun
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from meanflow.command import heartbeat
from meanflow.errors import UserError
from meanflow.method.objective import MeanFlowLoss
from meanflow.method.plan import Planner, whole_batch
from meanflow.model.copies import kept_copies
from meanflow.training import step as step_module
from meanflow.training.engine import capture_if_possible
from meanflow.training.messages import explained_failures
from meanflow.training.optim import load_state_tensors, make_optimizer, state_tensors
from meanflow.training.step import Step
from meanflow.training.trainer import Trainer, train
from meanflow.world import World

GUIDED = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.6, "label_drop": 0.2}


def config(objective=None, batch=16, **options):
    base = runs.tiny(batch=batch, **options)
    guided = GUIDED | {"share_equal": 0.75} if base.objective.guidance_input == "none" else {"label_drop": 0.2}
    return replace(base, objective=replace(base.objective, **(guided | (objective or {}))))


def steps_of(run, out, count, world=None):
    """(terms of interest, gradient, its norm, sizes) of some steps of a run, and the trainer after them."""
    trainer, rows = Trainer(run, out, world), []
    for p in trainer.net.parameters():  # adaLN-Zero starts as the identity
        generator = torch.Generator().manual_seed(p.numel())
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    for step in range(count):
        micro_batches = trainer.inputs(step)
        done = trainer.make_step(*(inputs.to(trainer.device) for inputs in micro_batches))
        loss = sum(terms.loss.item() for terms in done.terms) / len(done.terms)
        raw = torch.cat([terms.raw.cpu() for terms in done.terms])
        sizes = len(micro_batches[-1].plan.rows), micro_batches[-1].plan.tangent_start
        gradient = torch.cat([p.grad.flatten() for p in trainer.net.parameters()]).cpu()
        rows.append((loss, raw, gradient, done.grad_norm.item(), sizes))
    return rows, trainer


def assert_same_steps(got, wanted, rtol):
    for step, wanted_step in zip(got, wanted, strict=True):
        loss, raw, gradient, norm, sizes = step
        loss_wanted, raw_wanted, gradient_wanted, norm_wanted, sizes_wanted = wanted_step
        assert sizes == sizes_wanted
        assert loss == pytest.approx(loss_wanted, rel=rtol) and norm == pytest.approx(norm_wanted, rel=10 * rtol)
        torch.testing.assert_close(raw, raw_wanted, rtol=rtol, atol=0)
        assert (gradient - gradient_wanted).norm() <= 10 * rtol * norm_wanted


@pytest.mark.parametrize("placement", ["first", "bernoulli"])
def test_improved_meanflows_planned_step_is_the_whole_batch(placement, tmp_path, monkeypatch):
    run = config({"equal_placement": placement}, name="digits-imf", checkpoint_blocks=placement == "bernoulli")
    planned, _ = steps_of(run, tmp_path / "planned", 3)
    monkeypatch.setattr(Planner, "plan", lambda self, *inputs: whole_batch(self.config, *inputs))
    whole, _ = steps_of(run, tmp_path / "whole", 3)
    for (*got, sizes), (*wanted, sizes_whole) in zip(planned, whole, strict=True):
        assert sizes[0] < sizes_whole[0] and sizes[1] > sizes_whole[1] == 0
        in_order = got[1].sort().values, wanted[1].sort().values
        assert_same_steps(*([(x[0], raw, *x[2:], 0)] for x, raw in zip((got, wanted), in_order, strict=True)), 1e-5)


COMPILED = {
    # all but the C++ of each kernel, which costs a minute
    "first, traced": ("digits", "first", "aot_eager"),
    "first": pytest.param("digits", "first", "inductor", marks=pytest.mark.slow),
    "bernoulli": pytest.param("digits", "bernoulli", "inductor", marks=pytest.mark.slow),
    "improved MeanFlow, traced": ("digits-imf", "first", "aot_eager"),
    "improved MeanFlow": pytest.param("digits-imf", "bernoulli", "inductor", marks=pytest.mark.slow),
}


@pytest.mark.parametrize(("name", "placement", "backend"), COMPILED.values(), ids=COMPILED)
def test_compiled_step_is_the_plain_step(name, placement, backend, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    objective = {"equal_placement": placement}
    plain, _ = steps_of(config(objective, name=name), tmp_path / "plain", 12)
    # fullgraph: a graph break raises; after the warm-up any recompilation raises
    compiled, trainer = steps_of(config(objective, name=name, compile=True), tmp_path / "compiled", 12)
    assert_same_steps(compiled, plain, 1e-5)
    assert len({sizes for *_, sizes in plain}) > 2  # several sizes came up
    assert trainer.make_step.compile_seconds > 0
    assert "compiling the step: done in" in capsys.readouterr().err

    (inputs,) = trainer.inputs(0)
    for tangent in trainer.planner.tangent_sizes:
        for guidance in trainer.planner.guidance_sizes:
            trainer.make_step(inputs._replace(plan=trainer.planner.example(guidance, tangent)))
    # a size that was not declared would compile, and says so instead
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        trainer.make_step(inputs._replace(plan=trainer.planner.example(1)))


CAPTURED = {  # the preset, compiled, over NCCL in a group of one, micro-batches
    "eager": ("digits", False, False, 1),
    "compiled": ("digits", True, False, 1),
    "improved": ("digits-imf", False, False, 1),
    "accumulated": ("digits", False, False, 2),
    "in a group of one": ("digits", False, True, 1),
    "compiled in a group of one": ("digits", True, True, 1),
    "accumulated in a group of one": ("digits", False, True, 2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name, compiled, connected, accumulate", CAPTURED.values(), ids=CAPTURED)
def test_captured_step_is_the_plain_step(name, compiled, connected, accumulate, tmp_path, monkeypatch):
    run = config(name=name, device="cuda", compile=compiled, accumulate=accumulate)
    plain, a = steps_of(run, tmp_path / "plain", 12)
    if connected:
        started_by_torchrun(monkeypatch)
    with World("cuda") as world:
        run = replace(run, train=replace(run.train, cuda_graph=True))
        captured, b = steps_of(run, tmp_path / "captured", 12, world)
        assert len(b.make_step._graphs) == len(b.planner.tangent_sizes) * len(b.planner.guidance_sizes)
        assert_same_steps(captured, plain, 1e-5)
        assert_same_moments(a, b)
        if accumulate == 1 and not connected:
            assert_gradients_are_lent(b)
        b.make_step.drop_graphs()


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
        make_step = Step(run, captured.make_step.loss, captured.optimizer, captured.planner, captured.guard)
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


@pytest.mark.parametrize("parallel, backend", [("ddp", "nccl"), ("ddp", "gloo"), ("fsdp", "nccl")])
def test_what_cannot_be_captured_runs_uncaptured(parallel, backend, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    world = SimpleNamespace(connected=True, device=torch.device("cuda"), is_main=True)
    found = capture_if_possible(runs.tiny(cuda_graph=True, parallel=parallel), world)
    said = capsys.readouterr().out
    assert found.train.cuda_graph == (not said) == ((parallel, backend) == ("ddp", "nccl"))
    if said:
        assert f"train.cuda_graph: got True with train.parallel {parallel} over {backend}, wanted ddp over nccl" in said
        assert said.count("\n") == 1


def test_capturing_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="train.cuda_graph: got True, wanted a GPU"):
        Trainer(runs.tiny(cuda_graph=True), tmp_path)


# --- the optimizer ---


def with_optimizer(implementation, **options):
    base = runs.tiny(**options)
    return replace(base, optim=replace(base.optim, implementation=implementation))


def test_native_and_torch_optimizers_train_alike(tmp_path):
    for name in ("native", "torch"):
        train(with_optimizer(name), tmp_path / name)
    native, plain = (runs.curve(tmp_path / name) for name in ("native", "torch"))
    for a, b in zip(native, plain, strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=1e-5)


def test_a_run_goes_on_with_another_implementation(tmp_path):
    train(with_optimizer("native"), tmp_path / "whole")
    train(with_optimizer("native", steps=6), tmp_path / "part")
    train(with_optimizer("torch"), tmp_path / "part")
    for a, b in zip(runs.curve(tmp_path / "part"), runs.curve(tmp_path / "whole"), strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=1e-5)


def test_low_precision_weights_are_the_weights(tmp_path):
    # the native optimizer keeps the bf16 weights, torch's leaves them to be cast at each call
    for name in ("native", "torch"):
        train(with_optimizer(name, precision="bf16"), tmp_path / name)
    native, cast = (runs.curve(tmp_path / name) for name in ("native", "torch"))
    for a, b in zip(native, cast, strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
    resumed = Trainer(with_optimizer("native", precision="bf16"), tmp_path / "native")
    copies = kept_copies(resumed.net)
    assert copies and all(p.abs().max() > 0 for kept in copies for p in kept.params)
    assert all(torch.equal(kept.copy, torch.cat(kept.params).bfloat16()) for kept in copies)
    assert not any("copy" in name for name in resumed.net.state_dict())


class FusedAdam(torch.optim.Optimizer):
    """Keeps its state as apex's does: moments by parameter, the steps by group."""

    capturable = False

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, capturable):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                for key in ("exp_avg", "exp_avg_sq"):
                    self.state[p].setdefault(key, torch.zeros_like(p)).add_(p.grad)


def test_apex_keeps_its_state(monkeypatch):
    package = type(sys)("apex.optimizers")
    package.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", package)
    net, optim = nn.Linear(3, 2), replace(runs.tiny().optim, implementation="apex")
    ema = copy.deepcopy(net)
    optimizer = make_optimizer(optim, net, ema)
    net(torch.ones(1, 3)).sum().backward()
    with torch.no_grad():
        net.weight.add_(1)
    optimizer.step()
    torch.testing.assert_close(ema.weight, net.weight - optim.ema_decay)  # the average moves with every optimizer
    other = make_optimizer(replace(optim, implementation="torch"), net)
    for target in (other, make_optimizer(optim, net)):
        load_state_tensors(target, net, state_tensors(optimizer, net))
        got, wanted = state_tensors(target, net), state_tensors(optimizer, net)
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in got)


def test_apex_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="optim.implementation: got apex.*NVIDIA's apex.*native or torch"):
        make_optimizer(with_optimizer("apex").optim, nn.Linear(2, 2))


@pytest.mark.gpu
def test_nvidia_apex_trains_alike(tmp_path):
    pytest.importorskip("apex.optimizers", reason="NVIDIA's apex is not installed")
    for name in ("native", "apex"):
        train(with_optimizer(name, device="cuda"), tmp_path / name)
    for a, b in zip(*(runs.curve(tmp_path / name) for name in ("native", "apex")), strict=True):
        assert a["raw"] == pytest.approx(b["raw"], rel=1e-3)


# --- failures ---


def test_out_of_memory_names_the_settings(tmp_path):
    run = config()
    trainer = Trainer(run, tmp_path)

    class TooLarge(MeanFlowLoss):
        def forward(self, *inputs):
            return torch.empty(2**60)

    loss = TooLarge(run.objective, trainer.net)
    step = Step(run, loss, trainer.optimizer, Planner(run.objective, 16))
    with pytest.raises(UserError, match=r"memory: the step does not fit.*train.batch.*bf16") as error:
        step(*trainer.inputs(0))
    assert "\n" not in str(error.value)


def test_a_gpu_without_memory_names_the_settings():
    with pytest.raises(UserError, match="memory: .*tried to allocate 2 GiB.*train.batch"), explained_failures():
        raise torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB\nmore lines")


def test_other_failures_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^something else$"), explained_failures():
        raise RuntimeError("something else")


@pytest.mark.slow
def test_a_missing_compiler_names_the_setting(tmp_path):
    program = (
        f"import sys; sys.path[:0] = [{str(fresh.ROOT / 'tests')!r}]\n"
        "import runs; from pathlib import Path; from meanflow import cli; from meanflow.training import train\n"
        "cli.run(lambda args: train(runs.tiny(compile=True), Path(args[0])))"
    )
    env = fresh.environment() | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "run"], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "train.compile: got True" in last and "--train.no-compile" in last


def test_heartbeat_says_how_long(capsys):
    with heartbeat("working", every=0.05):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and lines[0].startswith("working: 0 s") and lines[-1].startswith("working: done")
