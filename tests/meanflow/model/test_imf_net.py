"""What the transformer of improved MeanFlow keeps, whatever its weights: passes, precision, checkpoints, padding."""

import pytest
import torch
from torch import nn

from benchmarks.harness.errors import relative_error
from meanflow.model import imf
from meanflow.model.imf import ImfDiT
from meanflow.model.pairs import Linear

F64 = torch.float64
SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
SIZES |= {"depth": 2, "head_depth": 1, "mlp_hidden": 42}
BATCH = 5


def network(dtype=F64, **options):
    torch.manual_seed(0)
    net = ImfDiT(**SIZES | options).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    for block in net.blocks:
        for padding in block.mlp.padding:
            padding.data.zero_()
    return net


def inputs(dtype=F64, batch=BATCH):
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, batch, 2, 4, 4, generator=g, dtype=dtype)
    r, t, a, b = torch.rand(4, batch, generator=g, dtype=dtype)
    omega = 1 + 7 * torch.rand(batch, generator=g, dtype=dtype)
    return (z, torch.minimum(r, t), torch.maximum(r, t), torch.arange(batch) % 4, omega, a / 2, 0.5 + b / 2), v


def gradients(net, outputs):
    net.zero_grad()
    sum(x.square().sum() for x in outputs).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("start", [0, 2, BATCH - 1])
def test_a_slice_of_the_batch_carries_the_tangent(start):
    net, (args, v) = network(), inputs()
    one = torch.ones_like(args[2])
    whole = net(*args, head="uv", tangents=(v, None, one))
    part = net(*args, head="uv", tangents=(v[start:], None, one[start:]), tangent_start=start)
    expected = (*whole[:2], whole[2][start:])
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(part, expected, strict=True))
    for x, y in zip(gradients(net, part[:2]), gradients(net, net(*args, head="uv")), strict=True):
        assert relative_error(x, y) < 1e-12


@pytest.mark.parametrize("head, others", [("u", "v"), ("v", "u")])
def test_a_head_alone_runs_and_trains_its_own_blocks_only(head, others):
    net, (args, _) = network(), inputs()
    for module in (*net.get_submodule(f"{others}_heads"), net.get_submodule(f"{others}_final_layer")):
        module.register_forward_hook(lambda *_: pytest.fail("the other head ran"))
    gradients(net, [net(*args, head=head)])
    for name, p in net.named_parameters():
        assert (p.grad is None) == name.startswith(others + "_"), name


def test_without_the_v_head():
    net, (args, v) = network(), inputs()
    alone = ImfDiT(**SIZES, v_head=False).to(F64)
    weights = {name: x for name, x in net.state_dict().items() if not name.startswith("v_")}
    alone.load_state_dict(weights)
    tangents = (v, None, torch.ones_like(args[2]))
    for x, y in zip(alone(*args, tangents=tangents), net(*args, tangents=tangents), strict=True):
        assert torch.equal(x, y)


def test_conditions_have_defaults():
    net, (args, _) = network(), inputs()
    one = torch.ones_like(args[2])
    assert torch.equal(net(*args[:4]), net(*args[:4], one, 0 * one, one))


def test_a_gradient_through_the_derivative_raises():
    net, (args, v) = network(), inputs()
    _, du_dt = net(*args, tangents=(v, None, None))
    with pytest.raises(RuntimeError, match="a gradient was asked for through a tangent"):
        du_dt.sum().backward()


def test_checkpointed_blocks_give_the_same():
    net, again, (args, v) = network(), network(checkpoint_blocks=True), inputs()
    tangents = (v[1:], None, torch.ones_like(args[2])[1:])
    results, saved = [], []
    for each in (net, again):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            outputs = each(*args, head="uv", tangents=tangents, tangent_start=1)
        saved.append(sum(sizes))
        results.append([*outputs, *gradients(each, outputs[:2])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert saved[1] < saved[0] / 3


@pytest.mark.parametrize("checkpoint_blocks", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled(checkpoint_blocks):
    net, (args, v) = network(checkpoint_blocks=checkpoint_blocks), inputs()

    def step(*args):
        u, v_, du_dt = net(*args, head="uv", tangents=(v[2:], None, torch.ones_like(args[2])[2:]), tangent_start=2)
        return u, v_, du_dt.detach()

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")):
        outputs = run(*args)
        results.append([*outputs, *gradients(net, outputs[:2])])
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(*results, strict=True))


def test_low_precision_products():
    args, v = inputs(torch.float32)
    exact, net = network(torch.float32).double(), network(torch.float32, compute_dtype=torch.bfloat16)
    tangents = (v, None, torch.ones_like(args[2]))
    found = net(*args, head="uv", tangents=tangents)
    double = [x.double() if x.is_floating_point() else x for x in args]
    expected = exact(*double, head="uv", tangents=tuple(x if x is None else x.double() for x in tangents))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and 1e-5 < relative_error(x, y) < 0.05
    # copies hold what a cast of each call gives
    before = [*found, *gradients(net, found[:2])]
    copies = net.make_copies()
    layers = [module for module in net.modules() if isinstance(module, Linear)]
    of_products = {getattr(layer, name) for layer in layers for name in layer.buffers_of}
    assert [p in of_products for p in net.parameters()] == [x is not None for x in copies]
    found = net(*args, head="uv", tangents=tangents)
    assert all(torch.equal(x, y) for x, y in zip([*found, *gradients(net, found[:2])], before, strict=True))


def test_rotations_stay_exact_in_any_dtype():
    net = network(torch.float32)
    exact = network(F64)
    assert exact.rope_cos.dtype == F64 and net.to(torch.bfloat16).rope_cos.dtype == torch.float32
    assert relative_error(net.rope_sin, exact.rope_sin) < 1e-7
    assert torch.equal(net.double().rope_sin, exact.rope_sin)


def test_padding_stays_zero_and_changes_nothing(monkeypatch):
    net, (args, _) = network(), inputs()
    assert net.blocks[0].mlp.fc2.weight.shape == (16, 48)
    monkeypatch.setattr(imf, "ALIGNMENT", 1)
    bare = ImfDiT(**SIZES).to(F64)
    assert sum(p.numel() for p in bare.parameters()) == bare.parameter_count == net.parameter_count
    weights = net.state_dict()
    for name in weights:
        if name.endswith("fc1.weight"):
            weights[name] = weights[name].unflatten(0, (2, 48))[:, :42].flatten(0, 1)
        if name.endswith("fc2.weight"):
            weights[name] = weights[name][:, :42]
    bare.load_state_dict(weights)
    for x, y in zip(net(*args, head="uv"), bare(*args, head="uv"), strict=True):
        assert relative_error(x, y) < 1e-13
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(3):
        gradients(net, net(*args, head="uv"))
        optimizer.step()
    assert all(padding.abs().max() == 0 for block in net.blocks for padding in block.mlp.padding)
