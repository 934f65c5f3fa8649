"""Conditions and heads, with either network's blocks: every combination is the same on pairs and by torch.func."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.harness.errors import relative_error
from meanflow.config import ModelConfig
from meanflow.errors import UserError
from meanflow.method.passes import func_jvp, pair_jvp
from meanflow.model.build import build_net
from meanflow.training.flops import sample_flops

F64 = torch.float64
BATCH = 4
SIZES = ModelConfig(3, 32, 2, 2, 4, 2, 3, mlp_ratio=2.6)
NETWORKS = {
    "v head": {"head_depth": 1},
    "v head of all blocks": {"head_depth": 3, "time_embedding": "t,r,h"},
    "omega": {"head_depth": 1, "guidance_input": "omega"},
    "interval": {"head_depth": 2, "guidance_input": "interval", "time_embedding": "h"},
    "interval, u alone": {"guidance_input": "interval"},
    "in context": {"head_depth": 1, "guidance_input": "interval", "conditioning": "in_context"},
    "in context, u alone": {"conditioning": "in_context"},
    "modern": {"network": "imf", "head_depth": 1, "guidance_input": "interval"},
    "modern, u alone": {"network": "imf", "time_embedding": "h"},
    "modern, in context": {"network": "imf", "head_depth": 1, "conditioning": "in_context", "guidance_input": "omega"},
}


def network(name, dtype=F64, compute_dtype=None, std=0.3, **options):
    torch.manual_seed(0)
    net = build_net(replace(SIZES, **NETWORKS[name]), compute_dtype, **options).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    for padding in (x for block in net.blocks for x in getattr(block.mlp, "padding", ())):
        padding.data.zero_()
    return net


def inputs(name, dtype=F64):
    """Primals, their tangents, what follows them, and the heads."""
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, BATCH, 2, 4, 4, generator=g, dtype=dtype)
    r, t, a, b = torch.rand(4, BATCH, generator=g, dtype=dtype)
    model = replace(SIZES, **NETWORKS[name])
    told = (1 + 7 * a, a / 2, 0.5 + b / 2)[: {"none": 0, "omega": 1, "interval": 3}[model.guidance_input]]
    heads = {"head": "uv"} if model.head_depth else {}
    z, r, t = z, torch.minimum(r, t), torch.maximum(r, t)
    return (z, r, t), (v, None, torch.ones_like(t)), (torch.arange(BATCH), *told), heads


def gradients(net, outputs):
    return torch.autograd.grad(sum(x.square().sum() for x in outputs), list(net.parameters()))


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_torch_func(name):
    net, (primals, tangents, others, heads) = network(name), inputs(name)
    wanted = func_jvp(net, primals, tangents, others, **heads)
    grads = gradients(net, wanted[:-1])
    for start in (0, 2):
        part = tuple(None if x is None else x[start:] for x in tangents)
        found = pair_jvp(net, primals, part, others, start, **heads)
        expected = (*wanted[:-1], wanted[-1][start:])
        assert len(found) == len(heads) + 2
        assert all(relative_error(x, y) < 1e-12 for x, y in zip(found, expected, strict=True))
        assert all(relative_error(x, y) < 1e-11 for x, y in zip(gradients(net, found[:-1]), grads, strict=True))
    # no parameter is idle, and the derivative is of all that is embedded
    assert all(g.abs().max() > 0 for g in grads) and found[-1].abs().max() > 0
    # each velocity is also to be had alone
    for head, u in zip("uv", found[:-1], strict=False):
        assert relative_error(net(*primals, *others, head=head), u) < 1e-13


@pytest.mark.parametrize("name", ["interval", "in context", "modern"])
def test_checkpointed_blocks_give_the_same(name):
    primals, tangents, others, heads = inputs(name)
    results = []
    for net in (network(name), network(name, checkpoint_blocks=True)):
        *outputs, du_dt = pair_jvp(net, primals, tangents, others, **heads)
        results.append([*outputs, du_dt, *gradients(net, outputs)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["interval", "in context", "modern"])
def test_low_precision_products(name):
    """In bf16 near fp64; the copies that an optimizer keeps, stacked where layers modulate, hold what a cast gives."""
    primals, tangents, others, heads = inputs(name, torch.float32)
    exact = [
        [x if x is None or not x.is_floating_point() else x.double() for x in xs] for xs in (primals, tangents, others)
    ]
    wanted = pair_jvp(network(name, torch.float32, std=0.1).double(), *exact, **heads)
    net, results = network(name, torch.float32, torch.bfloat16, std=0.1), []
    for _ in range(2):
        found = pair_jvp(net, primals, tangents, others, **heads)
        results.append([*found, *gradients(net, found[:-1])])
        assert len(net.make_copies()) == len(list(net.parameters()))
        # a pass for guidance alone takes the stack
        with torch.no_grad():
            results[-1].append(net(*primals, *others))
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == torch.float32 and 1e-5 < relative_error(x, y) < 0.02
    assert hasattr(net, "modulation_copy") == (name != "in context")
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interval", "in context", "modern"])
def test_compiled(name):
    primals, tangents, others, heads = inputs(name)
    net, part = network(name), tuple(None if x is None else x[2:] for x in tangents)

    def step(*primals):
        *outputs, du_dt = pair_jvp(net, primals, part, others, 2, **heads)
        return *outputs, du_dt.detach()

    torch._dynamo.reset()
    results = []
    for run in (step, torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")):
        outputs = run(*primals)
        results.append([*outputs, *gradients(net, outputs[:-1])])
    assert all(relative_error(x, y) < 1e-10 for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_guidance_has_defaults_and_must_be_known(name):
    net, ((z, r, t), _, (y, *told), _) = network(name), inputs(name)
    defaults = (torch.ones_like(t), torch.zeros_like(t), torch.ones_like(t))
    assert torch.equal(net(z, r, t, y), net(z, r, t, y, *defaults[: len(told)]))
    if told:
        assert relative_error(net(z, r, t, y, *told), net(z, r, t, y)) > 1e-3
    if len(told) < 3:
        unknown = ("omega", "t_min")[min(len(told), 1)]
        with pytest.raises(UserError, match=f"{unknown}: got 'a tensor', wanted none: this network is not told it"):
            net(z, r, t, y, *defaults)


@pytest.mark.parametrize("name", NETWORKS)
def test_counted_operations(name):
    """Products of the patches, of each embedded scalar, of blocks and last layers: forward passes by hand."""
    model = replace(SIZES, **NETWORKS[name])
    width, told = model.hidden_size, {"none": 0, "omega": 1, "interval": 3}[model.guidance_input]
    pixels, times = model.patch_size**2 * model.in_channels, len(model.time_embedding.split(","))
    adaln, modern = model.conditioning == "adaln", model.network == "imf"
    extra = 0 if adaln else 8 + 4 + {0: 0, 1: 4, 3: 8}[told]
    length, hidden = model.tokens + extra, -(-model.mlp_hidden // 16) * 16 if modern else model.mlp_hidden
    mlp = 3 * width * hidden if modern else 2 * width * hidden
    block = length * (4 * width**2 + mlp + 2 * length * width) + adaln * 6 * width**2
    last = model.tokens * width * pixels + adaln * 2 * width**2
    first = model.tokens * width * pixels + (times + told) * (256 * width + width**2)
    flops = sample_flops(model)
    assert flops.forward == 2 * (first + model.depth * block + last)
    assert flops.primal == flops.forward + 2 * (model.head_depth * block + (model.head_depth > 0) * last)
    # none of v's own blocks, of guidance and of r, which have no tangent; attention has two products for each
    still = told + ("r" in model.time_embedding)
    attention = model.depth * 2 * length**2 * width
    assert flops.tangent == flops.forward + 2 * (attention - still * (256 * width + width**2))


def test_without_a_v_head_a_dit_is_its_u():
    """What sampling needs of a DiT with a head for v are the parameters of one without, by their names."""
    net, alone = network("interval"), build_net(replace(SIZES, **NETWORKS["interval"] | {"head_depth": 0})).to(F64)
    weights = net.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    primals, tangents, others, _ = inputs("interval")
    for x, y in zip(pair_jvp(alone, primals, tangents, others), pair_jvp(net, primals, tangents, others), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["in context", "modern"])
def test_blocks_begin_as_the_identity(name):
    """Gates start at zero, and tokens and embedders do not: the first gradients are those of the last layers."""
    torch.manual_seed(0)
    net, (primals, _, others, heads) = build_net(replace(SIZES, **NETWORKS[name])).to(F64), inputs(name)
    outputs = net(*primals, *others, **heads)
    assert all(u.abs().max() == 0 for u in outputs)
    grads = torch.autograd.grad(sum((u - 1).square().sum() for u in outputs), list(net.parameters()), allow_unused=True)
    moved = {name for (name, _), g in zip(net.named_parameters(), grads, strict=True) if g is not None and g.any()}
    assert moved and all("final_layer.linear" in name for name in moved), moved
    for name, p in net.named_parameters():
        assert p.any() or name.endswith("bias") or any(x in name for x in ("modulation", "gate_m", "linear")), name
