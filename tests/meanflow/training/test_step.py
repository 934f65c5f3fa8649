"""The step compiled against the plain one, the optimizer's implementations, and failures explained."""

import copy
import functools
import subprocess
import sys
import time
from dataclasses import replace

import fresh
import pytest
import runs
import torch
from steps import assert_same_steps, config, steps_of
from torch import nn

from meanflow.command import heartbeat
from meanflow.errors import UserError
from meanflow.method.contract import ObjectiveLoss
from meanflow.model.copies import kept_copies
from meanflow.objectives.meanflow import MeanFlow
from meanflow.objectives.meanflow_plan import whole_batch
from meanflow.training.messages import explained_failures
from meanflow.training.optim import load_state_tensors, make_optimizer, state_tensors
from meanflow.training.step import Step
from meanflow.training.trainer import Trainer, train


@pytest.mark.parametrize("placement", ["first", "bernoulli"])
def test_improved_meanflows_planned_step_is_the_whole_batch(placement, tmp_path, monkeypatch):
    run = config({"equal_placement": placement}, name="digits-imf", checkpoint_blocks=placement == "bernoulli")
    planned, _ = steps_of(run, tmp_path / "planned", 3)
    monkeypatch.setattr(MeanFlow, "plan", lambda self, drawn: whole_batch(self.config, *drawn))
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
    "improved MeanFlow, traced": pytest.param("digits-imf", "first", "aot_eager", marks=pytest.mark.slow),
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
    example = trainer.objective.example
    for sizes in trainer.objective.declared:
        trainer.make_step(inputs._replace(plan=example(sizes)))
    # a size that was not declared would compile, and says so instead
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        trainer.make_step(inputs._replace(plan=example((trainer.objective.declared[0][0], 1))))


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


def test_state_is_loaded_where_a_captured_step_reads_it():
    net = nn.Linear(3, 2)
    optimizer = make_optimizer(runs.tiny().optim, net)
    held = state_tensors(optimizer, net)
    load_state_tensors(optimizer, net, {name: x + 1 for name, x in held.items()})
    for name, x in state_tensors(optimizer, net).items():
        assert x.data_ptr() == held[name].data_ptr() and torch.equal(x, torch.ones_like(x))


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

    class TooLarge(ObjectiveLoss):
        def forward(self, *inputs):
            return torch.empty(2**60)

    step = Step(run, TooLarge(trainer.objective, trainer.net), trainer.optimizer, trainer.objective)
    with pytest.raises(UserError, match=r"memory: the step does not fit.*train.batch.*bf16") as error:
        step(*trainer.inputs(0))
    assert "\n" not in str(error.value)


def test_a_gpu_without_memory_names_the_settings():
    with pytest.raises(UserError, match="memory: .*tried to allocate 2 GiB.*train.batch"), explained_failures():
        raise torch.OutOfMemoryError("CUDA: tried to allocate 2 GiB\nmore lines")


def test_other_failures_stay_what_they_are():
    with pytest.raises(RuntimeError, match="^something else$"), explained_failures():
        raise RuntimeError("something else")


def test_no_size_is_compiled_with_a_gradient(tmp_path, monkeypatch):
    gradient, found = Step._gradient, []

    def watched(self, inputs):
        found.append([p.grad is None for p in self.params])
        return gradient(self, inputs)

    monkeypatch.setattr(Step, "_gradient", watched)
    run = runs.tiny(batch=4)
    trainer = Trainer(replace(run, objective=replace(run.objective, equal_placement="bernoulli")), tmp_path)
    trainer.make_step._warm_up(trainer.inputs(0)[0])
    assert len(found) > 1 and all(all(each) for each in found)


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
