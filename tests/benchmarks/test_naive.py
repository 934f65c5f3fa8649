"""The baseline computes the same as the step on pairs, costs what it is said to cost, and compiles."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads.naive import NaiveDiT, naive_terms
from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.model.build import build_net
from meanflow.objectives.meanflow import meanflow_terms

TINY = ModelConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=4, in_channels=2, num_classes=3)
BATCH = 6
GUIDED = ObjectiveConfig(omega=0.2, kappa=0.92, guidance_end=0.75)
OBJECTIVES = {
    "unguided": ObjectiveConfig(),
    "omega alone": ObjectiveConfig(omega=2.0),
    "kappa": ObjectiveConfig(omega=1.0, kappa=0.5),
    "interval": GUIDED,
    "dropped are guided too": replace(GUIDED, guide_dropped=True),
    "gap not clipped": ObjectiveConfig(clip_gap=False),
    "another power": ObjectiveConfig(norm_p=0.5),
    "another tangent": ObjectiveConfig(tangent=(0.5, 1.0)),
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks(model: ModelConfig, compute_dtype=None):
    """Ours and the naive one, of the same random weights."""
    torch.manual_seed(0)
    net = build_net(model, compute_dtype)
    for p in net.parameters():  # adaLN-Zero starts as the identity: nothing would depend on anything
        nn.init.normal_(p, std=0.2)
    naive = NaiveDiT(model, compute_dtype)
    naive.load_state_dict(net.state_dict())
    return net, naive


def inputs(model: ModelConfig):
    torch.manual_seed(1)
    x, e = torch.randn(2, BATCH, model.in_channels, model.input_size, model.input_size)
    r, t = torch.rand(2, BATCH).sort(0).values
    r[-1], t[-1] = t[-1].clone(), r[-1].clone()  # r > t, for the clip
    sample = torch.arange(BATCH)
    # each its own tensor, as naive_terms asks for
    return x.clone(), e.clone(), torch.where(sample < 4, t, r), t.clone(), sample % model.num_classes, sample < 1


def gradients(terms, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(terms.loss, list(net.parameters()))])


def assert_same(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("embedding", ["t,h", "t,r,h"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_equals_the_step_on_pairs(double, objective, embedding):
    model = replace(TINY, time_embedding=embedding)
    (net, naive), batch = networks(model), inputs(model)
    ours, theirs = meanflow_terms(objective, net, *batch), naive_terms(objective, naive, *batch)
    assert ours.du_dt.abs().max() > 1
    for name in ("loss", "u", "du_dt"):
        assert_same(getattr(theirs, name), getattr(ours, name), 1e-10)
    ours = gradients(ours, net)
    # parameters are registered in the same order
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in naive.named_parameters()]
    assert_same(gradients(theirs, naive), ours, 1e-10)


def test_official_size_has_the_same_weights():
    with torch.device("meta"):
        model = ModelConfig.official("B/4")
        ours, naive = build_net(model), NaiveDiT(model)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert {name: p.shape for name, p in naive.state_dict().items()} == shapes
    assert naive.pos_embed.shape == ours.pos_embed.shape


def test_autocast_reaches_products_and_attention_alone():
    (net, naive), batch = networks(TINY, torch.bfloat16), inputs(TINY)
    dtypes = {}

    def note(name):
        def hook(module, args, out):
            dtypes[name] = out.dtype

        return hook

    for name, module in naive.named_modules():
        module.register_forward_hook(note(name))
    theirs = naive_terms(GUIDED, naive, *batch)
    assert dtypes["blocks.1.attn"] == dtypes["blocks.1.mlp"] == torch.bfloat16
    assert dtypes["blocks.1.norm1"] == dtypes["blocks.1"] == theirs.loss.dtype == torch.float32
    exact = naive_terms(GUIDED, networks(TINY)[1], *batch)
    ours = meanflow_terms(GUIDED, net, *batch)
    for name in ("u", "du_dt"):
        wanted = getattr(exact, name)
        error, our_error = ((getattr(got, name) - wanted).norm() for got in (theirs, ours))
        # the same products in the same dtype: a baseline less exact by far would be another computation
        assert 0.5 < error / our_error < 2


def test_costs_what_the_official_step_costs():
    (_, naive), batch = networks(TINY), inputs(TINY)
    x, e, r, t, y, _ = batch

    def flops(fn):
        with FlopCounterMode(display=False) as counter:
            fn()
        return counter.get_total_flops()

    def step(objective):
        return flops(lambda: naive_terms(objective, naive, *batch).loss.backward())

    plain = flops(lambda: naive(x, r, t, y))
    with_gradient = flops(lambda: naive(x, r, t, y).sum().backward())
    direction = (e - x, torch.zeros_like(r), torch.ones_like(t))
    derivative = flops(lambda: torch.func.jvp(lambda z, r, t: naive(z, r, t, y), (x, r, t), direction)) - plain
    # no gradient goes through the derivative, and each guidance forward is one
    assert step(ObjectiveConfig()) == derivative + with_gradient
    assert step(ObjectiveConfig(omega=2.0)) == plain + derivative + with_gradient
    assert step(GUIDED) == 2 * plain + derivative + with_gradient


def test_guidance_is_predicted_without_a_graph():
    (_, naive), batch, recorded = networks(TINY), inputs(TINY), []
    naive.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    naive_terms(GUIDED, naive, *batch)
    assert recorded == [False, False, True]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend):
    model = replace(TINY, depth=1)
    (_, naive), batch = networks(model), inputs(model)
    eager = naive_terms(GUIDED, naive, *batch)
    compiled = torch.compile(naive_terms, fullgraph=True, dynamic=False, backend=backend)(GUIDED, naive, *batch)
    for name in ("u", "du_dt"):
        assert_same(getattr(compiled, name), getattr(eager, name), 1e-5)
    assert_same(gradients(compiled, naive), gradients(eager, naive), 1e-4)


def test_refuses_what_it_does_not_compute():
    (_, naive), batch = networks(TINY), inputs(TINY)
    with pytest.raises(ValueError, match="guidance_weights: got 'ema'"):
        naive_terms(replace(GUIDED, guidance_weights="ema"), naive, *batch)
