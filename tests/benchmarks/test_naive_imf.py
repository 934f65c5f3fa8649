"""The baseline of improved MeanFlow computes the same as the step on pairs, costs what it is said to cost, compiles."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads.naive import naive_terms
from benchmarks.workloads.naive_imf import NaiveImfDiT, naive_imf_terms
from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.method.guidance import GuidanceInputs
from meanflow.model.build import build_net
from meanflow.objectives.meanflow import meanflow_terms
from meanflow.presets import IMPROVED
from meanflow.recipe import IMF_OPTIONS

TINY = ModelConfig(
    depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=4, in_channels=2, num_classes=3,
    head_depth=1, **IMF_OPTIONS | {"mlp_ratio": 1.3},
)  # fmt: skip
BATCH = 6


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks(model: ModelConfig = TINY, compute_dtype=None):
    """Ours and the naive one, of the same random weights."""
    torch.manual_seed(0)
    net = build_net(model, compute_dtype)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    naive = NaiveImfDiT(model, compute_dtype)
    naive.load_state_dict(net.state_dict())
    return net, naive


def inputs():
    """Three samples of r = t, one of them without a label; guidance acts in one of the others."""
    torch.manual_seed(1)
    x, e = torch.randn(2, BATCH, 2, 4, 4)
    r, t = torch.rand(2, BATCH).sort(0).values
    sample = torch.arange(BATCH)
    equal = sample < 3
    omega, start = 1 + 7 * torch.rand(BATCH), torch.where(equal | (sample == 3), 0.0, 1.5).to(t)
    guidance = GuidanceInputs(omega, start, torch.ones_like(t))
    # each its own tensor, as naive_terms asks for
    return x.clone(), e.clone(), torch.where(equal, t, r), t.clone(), sample % 3, sample < 1, guidance


def ours(objective: ObjectiveConfig, net, batch):
    *batch, guidance = batch
    return meanflow_terms(objective, net, *batch, inputs=guidance)


def gradients(terms, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(terms.loss, list(net.parameters()))])


def assert_same(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("norm_p", [1.0, 0.5])
def test_equals_the_step_on_pairs(double, norm_p):
    (net, naive), batch, objective = networks(), inputs(), replace(IMPROVED, norm_p=norm_p)
    assert net.shared_blocks[0].mlp.fc2.in_features > TINY.mlp_hidden  # stored with padding
    exact, theirs = ours(objective, net, batch), naive_imf_terms(objective, naive, *batch)
    assert exact.du_dt.abs().max() > 1
    for name in ("loss", "u", "du_dt"):
        assert_same(getattr(theirs, name), getattr(exact, name), 1e-10)
    # parameters are registered in the same order
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in naive.named_parameters()]
    exact = gradients(exact, net)
    assert_same(gradients(theirs, naive), exact, 1e-10)
    for layer in (naive.shared_blocks[0].attn, naive.u_heads[0].attn, naive.v_heads[0].attn):
        (dq_norm,) = torch.autograd.grad(naive_imf_terms(objective, naive, *batch).loss, layer.q_norm)
        assert dq_norm.abs().max() > 1e-6 * exact.abs().max()


def test_meanflows_objective_trains_it_too(double):
    (net, naive), (*batch, _) = networks(), inputs()
    objective = ObjectiveConfig(kappa=0.5)
    exact, theirs = meanflow_terms(objective, net, *batch), naive_terms(objective, naive, *batch)
    for name in ("loss", "u", "du_dt"):
        assert_same(getattr(theirs, name), getattr(exact, name), 1e-10)


@pytest.mark.parametrize("size", ["imf-B/2", "imf-L/2"])
def test_official_size_has_the_same_weights(size):
    with torch.device("meta"):
        model = replace(ModelConfig.official(size), depth=2, head_depth=1)
        net, naive = build_net(model), NaiveImfDiT(model)
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    assert {name: p.shape for name, p in naive.state_dict().items()} == shapes
    assert naive.cos.shape == net.rope_cos.shape


def test_autocast_reaches_products_and_attention_alone():
    (net, naive), batch, dtypes = networks(compute_dtype=torch.bfloat16), inputs(), {}
    for name, module in naive.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: dtypes.update({name: out.dtype}))
    theirs = naive_imf_terms(IMPROVED, naive, *batch)
    assert dtypes["u_heads.0.attn"] == dtypes["u_heads.0.mlp"] == torch.bfloat16
    assert dtypes["u_heads.0"] == theirs.loss.dtype == torch.float32
    exact, low = naive_imf_terms(IMPROVED, networks()[1], *batch), ours(IMPROVED, net, batch)
    for name in ("u", "du_dt"):
        wanted = getattr(exact, name)
        error, our_error = ((getattr(got, name) - wanted).norm() for got in (theirs, low))
        # the same products in the same dtype: a baseline less exact by far would be another computation
        assert 0.5 < error / our_error < 2


def test_costs_what_is_used():
    (_, naive), batch = networks(), inputs()
    x, e, r, t, y, _, guidance = batch

    def flops(fn):
        with FlopCounterMode(display=False) as counter:
            fn()
        return counter.get_total_flops()

    def both_heads():
        stream = naive.shared(x, t, t, y, *guidance)
        return naive.head("u", stream) + naive.head("v", stream)

    direction = (e - x, torch.zeros_like(r), torch.ones_like(t))
    of_u = flops(lambda: naive(x, r, t, y, *guidance))
    derivative = flops(lambda: torch.func.jvp(lambda z, r, t: naive(z, r, t, y, *guidance), (x, r, t), direction))
    # one head in each of two guidance passes, the derivative to u, both heads with a gradient
    wanted = 2 * of_u + (derivative - of_u) + flops(lambda: both_heads().sum().backward())
    assert flops(lambda: naive_imf_terms(IMPROVED, naive, *batch).loss.backward()) == wanted


@pytest.mark.slow
def test_compiles_whole():
    (_, naive), batch = networks(), inputs()
    eager = naive_imf_terms(IMPROVED, naive, *batch)
    compiled = torch.compile(naive_imf_terms, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled = compiled(IMPROVED, naive, *batch)
    for name in ("u", "du_dt"):
        assert_same(getattr(compiled, name), getattr(eager, name), 1e-5)
    assert_same(gradients(compiled, naive), gradients(eager, naive), 1e-4)


def test_each_refuses_the_others_objective():
    (_, naive), (*batch, guidance) = networks(), inputs()
    with pytest.raises(ValueError, match="direction: got 'v_head', wanted 'guided'; the naive step"):
        naive_terms(IMPROVED, naive, *batch)
    for option, value in {"direction": "boundary", "guidance_input": "omega", "guidance_weights": "ema"}.items():
        with pytest.raises(ValueError, match=f"{option}: got '{value}', wanted"):
            naive_imf_terms(replace(IMPROVED, **{option: value}), naive, *batch, guidance)
