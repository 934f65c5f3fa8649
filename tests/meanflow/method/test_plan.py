"""The planned step against the official one, on every kind of batch; what the plans ask for, counted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meanflow.config import ObjectiveConfig
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method.times import draw_times, drop_mask
from meanflow.model.dit import DiT
from meanflow.objectives.meanflow import MeanFlow, meanflow_terms
from meanflow.objectives.meanflow_plan import Drawn, whole_batch

F64 = torch.float64
BATCH = 12


def network():
    torch.manual_seed(0)
    net = DiT(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch(equal: torch.Tensor, drop: torch.Tensor):
    g = torch.Generator().manual_seed(1)
    x, e = (torch.randn(len(equal), 2, 4, 4, generator=g, dtype=F64) for _ in range(2))
    r, t = torch.rand(2, len(equal), generator=g, dtype=F64).sort(0).values
    return x, e, torch.where(equal, t, r), t, torch.arange(len(equal)) % 3, drop


GUIDED = ObjectiveConfig(omega=0.2, kappa=0.92, guidance_end=0.75)
OBJECTIVES = {
    "unguided": ObjectiveConfig(),
    "omega alone": ObjectiveConfig(omega=2.0),
    "kappa": ObjectiveConfig(omega=1.0, kappa=0.5),
    "interval": GUIDED,
    "nobody inside": ObjectiveConfig(omega=2.0, kappa=0.5, guidance_start=1.0),
    "guided by other weights": replace(GUIDED, guidance_weights="ema"),
    "dropped are guided too": replace(GUIDED, guide_dropped=True),
    "other tangent": replace(GUIDED, tangent=(0.5, 1.0)),
}
FIRST, SOME = torch.arange(BATCH) < 9, torch.arange(BATCH) % 3 < 2
NONE, ALL = torch.zeros(BATCH, dtype=torch.bool), torch.ones(BATCH, dtype=torch.bool)
BATCHES = {  # r = t, dropped, placement
    "official": (FIRST, torch.arange(BATCH) < 2, "first"),
    "scattered": (SOME, torch.arange(BATCH) % 4 == 0, "bernoulli"),
    "all r = t": (ALL, torch.arange(BATCH) < 2, "bernoulli"),
    "no r = t": (NONE, torch.arange(BATCH) < 2, "bernoulli"),
    "nothing dropped": (FIRST, NONE, "first"),
    "all dropped": (FIRST, ALL, "first"),
}


def gradients(terms, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(terms.loss, list(net.parameters()))])


def assert_near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * max(wanted.abs().max().item(), 1e-300))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("equal, drop, placement", BATCHES.values(), ids=BATCHES)
def test_planned_step_is_the_official_step(objective, equal, drop, placement):
    objective = replace(objective, equal_placement=placement)
    net, inputs = network(), batch(equal, drop)
    guide = None
    if objective.guidance_weights == "ema":
        guide = network()
        nn.init.normal_(guide.final_layer.linear.weight, std=0.3)
    plan = MeanFlow(objective, BATCH).plan(Drawn(inputs[2], inputs[3], drop))
    planned = meanflow_terms(objective, net, *inputs, plan, guide=guide)
    whole = meanflow_terms(objective, net, *inputs, guide=guide)
    order = torch.arange(BATCH) if plan.order is None else plan.order
    for name in ("raw", "weight", "v_loss", "u", "u_tgt", "v_g"):
        assert_near(getattr(planned, name), getattr(whole, name)[order])
    if plan.tangent_start < BATCH:
        assert_near(planned.du_dt, whole.du_dt[order][plan.tangent_start :])
    assert torch.equal(planned.equal, whole.equal[order])
    assert_near(planned.loss, whole.loss)
    assert_near(gradients(planned, net), gradients(whole, net))


class Counted(nn.Module):
    """Counts the samples of each pass."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, z, r, t, y, tangents=None, tangent_start=None):
        self.passes.append((len(z), 0 if tangents is None else len(tangents[0]), bool((y < 3).all())))
        return z if tangents is None else (z, tangents[0])


def passes(objective, equal, drop):
    """(samples, samples with a tangent, whether all have a label) of each call of the network."""
    net, inputs = Counted(), batch(equal, drop)
    plan = MeanFlow(objective, len(equal)).plan(Drawn(inputs[2], inputs[3], drop))
    meanflow_terms(objective, net, *inputs, plan)
    return net.passes


def test_passes_that_a_step_needs():
    first, nobody = torch.arange(32) < 24, torch.zeros(32, dtype=torch.bool)
    assert passes(ObjectiveConfig(), first, nobody) == [(32, 8, True)]
    assert passes(ObjectiveConfig(share_equal=1.0), ~nobody, nobody) == [(32, 0, True)]
    # omega 2 without kappa: no conditional forward; 32 null rows
    assert passes(ObjectiveConfig(omega=2.0), first, nobody)[0][0] == 32
    # with kappa the conditional forward of the 8 samples with r < t alone
    assert passes(ObjectiveConfig(kappa=0.5), first, nobody)[0][0] == 40
    # three dropped labels: 29 null rows and 8 conditional ones, padded to a multiple of 4
    assert passes(ObjectiveConfig(kappa=0.5), first, torch.arange(32) < 3)[0][0] == 40
    assert passes(ObjectiveConfig(kappa=0.5), first, torch.arange(32) < 5)[0][0] == 36
    # nobody within the interval: the smallest group, of padding
    assert passes(ObjectiveConfig(kappa=0.5, guidance_start=1.0), first, nobody)[0][0] == 4
    # weights other than those in training predict every sample
    assert passes(ObjectiveConfig(kappa=0.5, guidance_weights="ema"), first, nobody)[0][0] == 64


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 70), st.integers(0, 2**32), st.sampled_from(list(OBJECTIVES)), st.booleans(), st.floats(0, 1))
def test_plans_have_declared_sizes(size, seed, name, first, share):
    placement = "first" if first else "bernoulli"
    objective = replace(OBJECTIVES[name], equal_placement=placement, share_equal=share, label_drop=0.2)
    planner = MeanFlow(objective, size)
    assert len({rows for _, rows in planner.declared}) <= 18
    drawn = []
    for step in range(3):
        draws = Draws(seed, step, torch.arange(size))
        drawn.append(Drawn(*draw_times(objective, draws), drop_mask(objective, draws.uniform(Purpose.LABEL_DROP))))
    alone, together = ([planner.plan(each, *others) for each in drawn] for others in ((), drawn))
    for plan, each in zip(alone + together, drawn + drawn, strict=True):
        assert_serves(planner, plan, each)
    # all take the largest of the sizes that they would take alone, or more rows where the derivative takes more
    sizes, wanted = ([plan.sizes for plan in plans] for plans in (together, alone))
    assert len(set(sizes)) == 1
    assert sizes[0][0] == max(tangent for tangent, _ in wanted) and sizes[0][1] >= max(rows for _, rows in wanted)
    if len({tangent for tangent, _ in wanted}) == 1:
        assert sizes[0] == max(wanted)


def assert_serves(planner, plan, drawn):
    (r, t, drop, _), size, objective = drawn, planner.batch, planner.config
    assert plan.sizes in planner.declared and size - plan.tangent_start == plan.sizes[0]
    order = torch.arange(size) if plan.order is None else plan.order
    assert torch.equal(order.sort().values, torch.arange(size))
    assert (r == t)[order][: plan.tangent_start].all()
    # the same samples are guided as in the official step, and each is predicted from its own row
    guided = whole_batch(objective, r, t, drop).guided[order]
    assert torch.equal(plan.guided, guided)
    rows, sample = plan.rows, torch.arange(size)
    if not len(rows):
        assert not guided.any()
        return
    assert torch.equal(rows[plan.null_row][guided], sample[guided]) and plan.null[plan.null_row][guided].all()
    own = guided & (plan.cond_row >= 0)
    assert torch.equal(rows[plan.cond_row][own], sample[own]) and not plan.null[plan.cond_row][own].any()
    if objective.kappa:
        # whoever has no row takes the primal pass, which has to be the conditional prediction
        assert ((r == t)[order] & ~drop[order])[guided & ~own].all()


def test_padding_is_an_eighth_of_the_batch_at_most():
    for size in (2, 7, 32, 64, 256):
        sizes = sorted(rows for _, rows in MeanFlow(GUIDED, size).declared)
        assert max(b - a for a, b in zip((0, *sizes), sizes, strict=False)) <= max(2, -(-size // 8))


def test_other_batches_are_refused():
    planner, nobody = MeanFlow(ObjectiveConfig(), 8), torch.zeros(8, dtype=torch.bool)
    r, t = torch.rand(2, 8).sort(0).values
    with pytest.raises(UserError, match="batch: got 4"):
        planner.plan(Drawn(r[:4], t[:4], nobody[:4]))
    with pytest.raises(UserError, match="first 6 samples"):
        planner.plan(Drawn(r, t, nobody))
