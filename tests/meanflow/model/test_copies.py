"""Gradients that stay products in bf16: the same steps to the last bit as when each is cast to fp32."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import runs
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from meanflow.model.copies import kept_copies, product_copies
from meanflow.objectives.build import make_objective
from meanflow.training import engine, optim
from meanflow.training import step as step_module
from meanflow.training.optim import gradient_norm, state_tensors
from meanflow.training.step import Step
from meanflow.training.trainer import Trainer, train

BF16, F32 = torch.bfloat16, torch.float32


def config(implementation="native", **train_options):
    base = runs.tiny(**{"precision": "bf16", "batch": 16} | train_options)
    guided = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.6, "label_drop": 0.2, "share_equal": 0.75}
    objective = replace(base.objective, **guided)
    return replace(base, objective=objective, optim=replace(base.optim, implementation=implementation))


@pytest.fixture
def cast(monkeypatch):
    """What is built now casts each product to fp32, as it reaches its parameter."""

    def patch():
        monkeypatch.setattr(optim, "keep_products", lambda *lists: None)
        monkeypatch.setattr(step_module, "product_copies", kept_copies)

    return patch


def randomised(trainer):
    # adaLN-Zero starts as the identity: most gradients would be 0
    for p in trainer.net.parameters():
        p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    trainer.net.load_state_dict(trainer.net.state_dict())
    return trainer


def copied(trainer):
    """Parameters with a copy, and the copies."""
    return {p for kept in kept_copies(trainer.net) for p in kept.params}, [k.copy for k in kept_copies(trainer.net)]


def everything(trainer):
    """Weights, averages, copies, moments and gradients, the latter in fp32."""
    yield from trainer.net.parameters()
    yield from trainer.ema.parameters()
    yield from copied(trainer)[1]
    yield from state_tensors(trainer.optimizer, trainer.net).values()
    yield from (p.grad.float() for p in trainer.net.parameters())


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_steps_are_those_of_cast_gradients(checkpoint_blocks, cast, tmp_path):
    """Of several sizes, and one that the guard leaves out; a hook sees what ``p.grad`` will be."""
    run = config(checkpoint_blocks=checkpoint_blocks)
    kept = randomised(Trainer(run, tmp_path / "kept"))
    cast()
    plain = randomised(Trainer(run, tmp_path / "plain"))
    seen, skipped = {id(kept): [], id(plain): []}, []
    for trainer in (kept, plain):

        def hook(grad, dtypes=seen[id(trainer)]):
            dtypes.append(grad.dtype)
            return grad * float("nan") if len(dtypes) == 3 else None

        trainer.net.blocks[0].attn.qkv.weight.register_hook(hook)
    for step in range(5):
        (inputs,) = kept.inputs(step)
        done, wanted = kept.make_step(inputs), plain.make_step(inputs)
        skipped.append(done.skipped.item())
        torch.testing.assert_close(done.grad_norm, wanted.grad_norm, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(everything(kept), everything(plain), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert skipped == [0, 0, 1, 0, 0]
    assert seen == {id(kept): [BF16] * 5, id(plain): [F32] * 5}
    params, copies = copied(kept)
    assert params and all(p.grad.dtype == (BF16 if p in params else F32) for p in kept.net.parameters())
    # nothing is left of autograd's way outside the layers
    assert all(copy.is_leaf and not copy.requires_grad for copy in copies)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"implementation": "torch"}, {"precision": "fp32"}], ids=str)
def test_gradients_that_are_summed_or_read_by_others_are_in_fp32(options, tmp_path):
    trainer = Trainer(config(**options), tmp_path)
    trainer.make_step(*trainer.inputs(0))
    assert not product_copies(trainer.net) and all(p.grad.dtype == F32 for p in trainer.net.parameters())


def test_gradients_of_several_processes_are_in_fp32(monkeypatch):
    monkeypatch.setattr(engine, "replicate", lambda loss, *_, **__: loss)
    for connected in (False, True):
        world = SimpleNamespace(connected=connected, device=torch.device("cpu"))
        net = engine.build_engine(config(), world, make_objective(config())).net
        assert bool(product_copies(net)) == (not connected)


def test_a_run_goes_on_with_cast_gradients(cast, tmp_path):
    """And the other way round: nothing in a checkpoint tells them apart."""
    train(config(steps=6), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    train(config(), tmp_path / "second")
    cast()
    train(config(), tmp_path / "first")
    assert runs.curve(tmp_path / "first") == runs.curve(tmp_path / "second")
    assert runs.final_state(tmp_path / "first") == runs.final_state(tmp_path / "second")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_norm_is_that_of_cast_gradients(device):
    # a GPU's kernel may go through a dtype in an order of its own
    bar = dict(rtol=0 if device == "cpu" else 1e-6, atol=0)
    grads = [torch.randn(n, device=device) * 10.0**-k for k, n in enumerate((1, 1000, 33, 70_001, 0))]
    mixed = [g if k % 2 else g.bfloat16() for k, g in enumerate(grads)]
    torch.testing.assert_close(gradient_norm(mixed), nn.utils.get_total_norm([g.float() for g in mixed]), **bar)
    low = [g.bfloat16() for g in grads]
    torch.testing.assert_close(gradient_norm(low), nn.utils.get_total_norm([g.float() for g in low]), **bar)
    assert gradient_norm([g.double() for g in grads]).dtype == torch.float64


def test_a_compiled_backward_casts_no_product(monkeypatch, tmp_path):
    """The step in one process has no cast of a weight's gradient left, in the graph or behind it."""
    found, run = [], config(compile=True)

    def backward(graph, inputs):
        (output,) = graph.graph.find_nodes(op="output")
        found.extend((x.target, x.meta["val"].shape) for x in output.args[0] if x is not None)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)
    monkeypatch.setattr(engine, "compile_loss", lambda loss: loss.compile(fullgraph=True, backend=backend))
    trainer = Trainer(run, tmp_path)
    # the loss alone is compiled, for one size, by the backend above
    eager = replace(run, train=replace(run.train, compile=False))
    made = {}
    for p in (params := copied(trainer)[0]):
        p.register_hook(lambda grad, p=p: made.update({p: grad.data_ptr()}))
    Step(eager, trainer.make_step.loss, trainer.optimizer, trainer.objective)(*trainer.inputs(0))
    # the biases of the patches, and of the two embedded times that are added up, have no copy
    cast = [tuple(shape) for target, shape in found if target is torch.ops.aten._to_copy.default]
    assert cast == [(run.model.hidden_size,)] * 3
    for p in params:
        assert p.grad.dtype == BF16 and p.grad.data_ptr() == made[p]


def test_one_product_modulates_all_layers(tmp_path):
    """The layers' own products, if one of them has a hook, give the same but for bf16's rounding."""
    trainer = randomised(Trainer(config(), tmp_path))
    (inputs,), net = trainer.inputs(0), trainer.net
    layers = [layer.adaLN_modulation for layer in (*net.blocks, net.final_layer)]
    called, gradients = [], []

    def gradient():
        loss = trainer.make_step._gradient(inputs).loss
        gradients.append([p.grad.float() for p in net.parameters()])
        net.zero_grad()
        return loss

    handle = layers[0][1].register_forward_hook(lambda *_: called.append(1))
    own = gradient()
    # a pass for guidance, and one for the loss
    assert len(called) == 2
    handle.remove()
    for layer in layers:
        # whoever calls it now fails
        layer.forward = None
    assert gradient().item() == pytest.approx(own.item(), rel=1e-2)
    for together, alone in zip(*reversed(gradients), strict=True):
        assert together.norm() > 0 and (together - alone).norm() < 0.02 * alone.norm()
    assert not any("copy" in name for name in net.state_dict())


@pytest.mark.parametrize(("options", "calls"), [({"checkpoint_blocks": True}, 3), ({"accumulate": 2}, 1)], ids=str)
def test_a_layer_modulates_by_itself(options, calls, tmp_path):
    """Where blocks are computed again, that time too; where gradients are summed, but for guidance."""
    trainer, called = Trainer(config(**options), tmp_path), []
    modulation = trainer.net.blocks[0].adaLN_modulation
    forward = modulation.forward
    modulation.forward = lambda c: called.append(1) or forward(c)
    trainer.make_step._gradient(trainer.inputs(0)[0])
    assert len(called) == calls
