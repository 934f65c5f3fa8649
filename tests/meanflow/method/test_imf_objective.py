"""The objective of improved MeanFlow: its plan beside the whole batch, draws, FLOPs."""

import functools
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig, ObjectiveConfig
from meanflow.draws import Draws, Purpose
from meanflow.errors import UserError
from meanflow.method.guidance import arrange_guidance, draw_guidance
from meanflow.method.passes import func_jvp, pair_jvp
from meanflow.model.build import build_net
from meanflow.model.dit import DiT
from meanflow.model.imf import ImfDiT
from meanflow.objectives.meanflow import MeanFlow, meanflow_terms
from meanflow.objectives.meanflow_plan import Drawn, Plan, whole_batch
from meanflow.recipe import IMF_SIZES
from meanflow_kernels.routing import Route, force_route

F64 = torch.float64
BATCH = 12
TINY = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}


def network(kind=ImfDiT, **options):
    torch.manual_seed(0)
    options = ({"depth": 2, "head_depth": 1, "mlp_hidden": 40} if kind is ImfDiT else {"depth": 2}) | options
    net = kind(**TINY, **options).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net


def batch(config, equal, drop, seed=1):
    """x, e, r, t, y, drop and the guidance."""
    g = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, len(equal), 2, 4, 4, generator=g, dtype=F64)
    r, t = torch.rand(2, len(equal), generator=g, dtype=F64).sort(0).values
    guidance = arrange_guidance(config, *torch.rand(3, len(equal), generator=g, dtype=F64), equal)
    return x, e, torch.where(equal, t, r), t, torch.arange(len(equal)) % 3, drop, guidance


OFFICIAL = ObjectiveConfig(guidance_input="interval", direction="v_head", share_equal=0.5)
MIXED = {"omega": 0.2, "kappa": 0.92, "guidance_end": 0.75}
OBJECTIVES = {
    "official": OFFICIAL,
    "omega alone": replace(OFFICIAL, guidance_input="omega"),
    "boundary, told": replace(OFFICIAL, direction="boundary"),
    "boundary, fixed guidance": replace(OFFICIAL, direction="boundary", guidance_input="none", **MIXED),
    "v head, fixed guidance": replace(OFFICIAL, guidance_input="none", **MIXED),
    "v head, fixed scale": replace(OFFICIAL, guidance_input="none", omega=2.0),
    "v head, no guidance": replace(OFFICIAL, guidance_input="none"),
    "guided direction, told": replace(OFFICIAL, direction="guided"),
    "predicted by other weights": replace(OFFICIAL, guidance_weights="ema"),
    "dropped are guided too": replace(OFFICIAL, guide_dropped=True),
}
FIRST, SOME = torch.arange(BATCH) < 6, torch.arange(BATCH) % 3 < 1
NONE, ALL = torch.zeros(BATCH, dtype=torch.bool), torch.ones(BATCH, dtype=torch.bool)
BATCHES = {  # r = t, dropped, placement
    "official": (FIRST, torch.arange(BATCH) < 2, "first"),
    "scattered": (SOME, torch.arange(BATCH) % 4 == 0, "bernoulli"),
    "all r = t": (ALL, torch.arange(BATCH) < 2, "bernoulli"),
    "no r = t": (NONE, torch.arange(BATCH) < 2, "bernoulli"),
    "nothing dropped": (FIRST, NONE, "first"),
    "dropped beyond r = t": (FIRST, torch.arange(BATCH) < 9, "first"),
    "all dropped": (FIRST, ALL, "first"),
}


def gradients(terms, net):
    grads = torch.autograd.grad(terms.loss, list(net.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for g, p in zip(grads, net.parameters(), strict=True)
        ]
    )


def assert_near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10 * max(wanted.abs().max().item(), 1e-300))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("equal, drop, placement", BATCHES.values(), ids=BATCHES)
def test_planned_step_is_the_whole_batch(objective, equal, drop, placement):
    objective = replace(objective, equal_placement=placement)
    net, (*inputs, guidance) = network(), batch(objective, equal, drop)
    guide = None
    if objective.guidance_weights == "ema":
        guide = network()
        nn.init.normal_(guide.v_final_layer.linear.weight, std=0.3)
    plan = MeanFlow(objective, BATCH).plan(Drawn(*inputs[2:4], drop, guidance))
    planned = meanflow_terms(objective, net, *inputs, plan, guidance, guide=guide)
    whole = meanflow_terms(objective, net, *inputs, inputs=guidance, guide=guide)
    order = torch.arange(BATCH) if plan.order is None else plan.order
    assert (planned.v is None) == (planned.raw_v is None) == (objective.direction != "v_head")
    for name in ("raw", "weight", "raw_v", "weight_v", "v_loss", "u", "v", "v_g"):
        got, wanted = getattr(planned, name), getattr(whole, name)
        if wanted is not None:
            assert_near(got, wanted[order])
    if plan.tangent_start < BATCH:
        assert_near(planned.du_dt, whole.du_dt[order][plan.tangent_start :])
        assert_near(planned.direction, whole.direction[order][plan.tangent_start :])
    assert torch.equal(planned.equal, whole.equal[order])
    assert_near(planned.loss, whole.loss)
    assert_near(gradients(planned, net), gradients(whole, net))


def test_a_dit_takes_the_boundary_form():
    objective = replace(OBJECTIVES["boundary, fixed guidance"])
    net, (*inputs, _) = network(DiT), batch(objective, FIRST, torch.arange(BATCH) < 2)
    plan = MeanFlow(objective, BATCH).plan(Drawn(*inputs[2:4], inputs[-1]))
    planned, whole = (meanflow_terms(objective, net, *inputs, p) for p in (plan, None))
    x, e, _, t, y, _ = inputs
    t_ = t[:, None, None, None]
    z = ((1 - t_) * x + t_ * e)[6:]
    assert_near(planned.direction, net(z, t[6:], t[6:], y[6:]))
    assert_near(gradients(planned, net), gradients(whole, net))


RUNGS = {  # of the ladder: (kind, options, objective)
    "v head, fixed guidance": (DiT, {"head_depth": 1}, OBJECTIVES["v head, fixed guidance"]),
    "omega": (DiT, {"head_depth": 1, "guidance_input": "omega"}, OBJECTIVES["omega alone"]),
    "interval": (DiT, {"head_depth": 1, "guidance_input": "interval"}, OFFICIAL),
    "in context": (DiT, {"head_depth": 1, "guidance_input": "interval", "in_context": True}, OFFICIAL),
    "boundary, told": (DiT, {"guidance_input": "interval"}, OBJECTIVES["boundary, told"]),
    "modern, modulated": (ImfDiT, {"in_context": False, "time_embedding": ("t", "h")}, OFFICIAL),
}


@pytest.mark.parametrize("kind, options, objective", RUNGS.values(), ids=RUNGS)
def test_every_rung_is_planned(kind, options, objective):
    """And by torch.func.jvp of the whole batch it is the same."""
    net, (*inputs, guidance) = network(kind, **options), batch(objective, FIRST, torch.arange(BATCH) < 2)
    plan = MeanFlow(objective, BATCH).plan(Drawn(*inputs[2:4], inputs[-1], guidance))
    planned, whole, func = (
        meanflow_terms(objective, net, *inputs, p, guidance, jvp=jvp)
        for p, jvp in ((plan, pair_jvp), (None, pair_jvp), (None, func_jvp))
    )
    grads = gradients(planned, net)
    for other in (whole, func):
        assert_near(planned.u, other.u)
        assert_near(planned.du_dt, other.du_dt[plan.tangent_start :])
        assert_near(planned.loss, other.loss)
        assert_near(grads, gradients(other, net))


@pytest.mark.parametrize("clip_gap", [True, False])
@pytest.mark.parametrize(
    "objective", [OFFICIAL, replace(OBJECTIVES["v head, fixed scale"], norm_p=0.5)], ids=("told", "fixed")
)
def test_u_form_and_v_form_are_one(objective, clip_gap):
    """Regression of V = u + (t - r) sg(du/dt) to v_g: the value and gradient of that of u to v_g - (t - r) du/dt.

    Also where r > t, which clip_gap is for: it clips the gap of both.
    """
    objective = replace(objective, clip_gap=clip_gap)
    net, (x, e, r, t, *others, guidance) = network(), batch(objective, FIRST, torch.arange(BATCH) < 2)
    r = torch.where(torch.arange(BATCH) > 9, t + 0.1, r)
    terms = meanflow_terms(objective, net, x, e, r, t, *others, inputs=guidance)
    y, drop = torch.where(others[1], net.num_classes, others[0]), others[1]
    told = () if objective.guidance_input == "none" else guidance
    t_, gap = t[:, None, None, None], (t - r)[:, None, None, None]
    u, v, du_dt = pair_jvp(
        net, ((1 - t_) * x + t_ * e, r, t), (terms.direction, None, torch.ones_like(t)), (y, *told), head="uv"
    )
    big_v = u + (gap.clamp(0, 1) if clip_gap else gap) * du_dt.detach()
    squares = [(a - terms.v_g).square().flatten(1).sum(1) for a in (big_v, v)]
    loss = sum((s / (s.detach() + objective.norm_c) ** objective.norm_p).mean() for s in squares)
    assert drop.any() and ((r > t).any())
    assert_near(loss, terms.loss)
    assert_near(gradients(terms._replace(loss=loss), net), gradients(terms, net))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["official", "all", "boundary, told"])
def test_compiled(name):
    """The planned step as one graph; also the whole batch, and rows of guidance of any number. The trainer's compiled
    step is traced without --full.
    """
    objective = OBJECTIVES.get(name, OFFICIAL)
    net, (*inputs, guidance) = network(), batch(objective, FIRST, torch.arange(BATCH) < 2)
    planner = MeanFlow(objective, BATCH)
    plans = [planner.plan(Drawn(*inputs[2:4], inputs[-1], guidance)), planner.example(planner.declared[0]), None]
    plans = plans if name == "all" else plans[:1]

    def step(plan):
        terms = meanflow_terms(objective, net, *inputs, plan, guidance)
        return terms.loss, [x for x in terms[1:] if x is not None]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for plan in plans:
        (loss, terms), (found, others) = step(plan), compiled(plan)
        assert_near(found, loss)
        for got, wanted in zip(others, terms, strict=True):
            assert torch.equal(got, wanted) if got.dtype == torch.bool else assert_near(got, wanted) is None
        for got, wanted in zip(
            *(torch.autograd.grad(x, net.blocks[0].attn.qkv.weight) for x in (found, loss)), strict=True
        ):
            assert_near(got, wanted)


# --- passes ---


class Counted(nn.Module):
    """Counts the samples of each pass."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.passes = []

    def forward(self, z, r, t, y, *guidance, head="u", tangents=None, tangent_start=None):
        self.passes.append((head, len(z), 0 if tangents is None else len(tangents[0])))
        out = (z,) * len(head)
        return (*out, tangents[0]) if tangents else out if len(out) > 1 else z


def passes(objective, drop):
    net, (*inputs, guidance) = Counted(), batch(objective, torch.arange(32) < 16, drop)
    # every other sample lies inside its interval
    start = torch.where(torch.arange(32) % 2 == 1, 0.0, 1.5).double()
    guidance = guidance._replace(start=start, end=torch.ones_like(start))
    plan = MeanFlow(objective, 32).plan(Drawn(*inputs[2:4], drop, guidance))
    meanflow_terms(objective, net, *inputs, plan, guidance)
    return net.passes


def test_passes_that_a_step_needs():
    nobody, three = torch.zeros(32, dtype=torch.bool), torch.arange(32) < 3
    # 16 conditional rows of r < t; 16 null rows of those inside
    assert passes(replace(OFFICIAL, label_drop=0.0), nobody)[0] == ("v", 32, 0)
    # dropped samples need no null row: of three, one is inside; padded by one to an even number
    assert passes(OFFICIAL, three) == [("v", 32, 0), ("uv", 32, 16)]
    assert passes(OFFICIAL, torch.arange(32) < 12) == [("v", 26, 0), ("uv", 32, 16)]
    assert passes(replace(OFFICIAL, guidance_input="none"), three) == [("v", 16, 0), ("uv", 32, 16)]
    assert passes(replace(OFFICIAL, direction="boundary"), three) == [("u", 32, 0), ("u", 32, 16)]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.integers(0, 2**32), st.sampled_from(list(OBJECTIVES)), st.booleans(), st.floats(0, 1))
def test_plans_have_declared_sizes(size, seed, name, first, share):
    placement = "first" if first else "bernoulli"
    objective = replace(OBJECTIVES[name], equal_placement=placement, share_equal=share, label_drop=0.2)
    planner = MeanFlow(objective, size)
    r, t, drop, guidance = drawn = planner.draw(Draws(seed, 0, torch.arange(size)))
    plan = planner.plan(drawn)
    assert plan.sizes in planner.declared and size - plan.tangent_start == plan.sizes[0]
    order, sample, rows = torch.arange(size) if plan.order is None else plan.order, torch.arange(size), plan.rows
    assert (r == t)[order][: plan.tangent_start].all()
    guided = whole_batch(objective, r, t, drop, guidance).guided[order]
    assert torch.equal(plan.guided, guided)
    derived, own = sample >= plan.tangent_start, plan.cond_row >= 0
    if objective.predicts_direction:
        assert own[derived].all()
    if len(rows):
        assert torch.equal(rows[plan.null_row][guided], sample[guided]) and plan.null[plan.null_row][guided].all()
        assert torch.equal(rows[plan.cond_row][own], sample[own]) and not plan.null[plan.cond_row][own].any()
    if objective.mixes_conditional:
        assert ((r == t)[order] & ~drop[order])[guided & ~own].all()
    example = planner.example(plan.sizes)
    assert [len(x) for x in example if x is not None] == [len(x) for x in plan if x is not None]


# --- FLOPs ---


def count(run) -> int:
    """By torch's counter; of attention's backward the four products of its mathematics: flash attention computes a
    fifth one again, which a forward pass is not charged for either.
    """
    products = {torch.ops.meanflow_kernels.attention_bwd: lambda do, q, *_, **__: 8 * prod(q) * q[1]}
    counter = FlopCounterMode(display=False, custom_mapping=products)
    with counter, force_route(Route.TRITON):
        run()
    return counter.get_total_flops()


@functools.cache
def flops(rows: int, model: ModelConfig) -> tuple[int, int]:
    """Of a step of 32 samples with so many rows of guidance, and of F: the blocks from the input to u, of the same."""
    # on meta no size may depend on a value: a plan of the right sizes
    plan = MeanFlow(OFFICIAL, 32).example((16, rows))
    plan = Plan(*(x if x is None else x.to("meta") for x in plan))
    with torch.device("meta"):
        net = build_net(model)
        z, t, y = torch.empty(32, 4, 32, 32), torch.empty(32), torch.empty(32, dtype=torch.long)
    guidance = arrange_guidance(OFFICIAL, t, t, t, t > 0)
    step = count(lambda: meanflow_terms(OFFICIAL, net, z, z, t, t, y, t > 0, plan, guidance).loss.backward())
    return step, count(lambda: net(z, t, t, y))


def flops_of_blocks(rows: int, model: ModelConfig) -> tuple[int, int]:
    """The same from networks of a few blocks: a count grows by the same with each block."""
    few = [flops(rows, replace(model, depth=a + b, head_depth=b)) for a, b in ((1, 1), (2, 1), (1, 2))]
    return tuple(x + (model.depth - 9) * (shared - x) + 7 * (head - x) for x, shared, head in zip(*few, strict=True))


BARS = {"B": (6.80, 6.82), "M": (5.80, 5.82), "L": (5.55, 5.57), "XL": (5.30, 5.32)}


@pytest.mark.parametrize("counted", [flops_of_blocks, pytest.param(flops, marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", IMF_SIZES)
def test_flops_of_a_step(size, counted):
    """In forwards of the batch: the mean over drawn plans of 32 and 128 samples."""
    (none, forward), (all_rows, _) = (counted(rows, ModelConfig.official(f"imf-{size}/2")) for rows in (32, 64))
    for samples, bar in zip((32, 128), BARS[size], strict=True):
        planner, rows, steps = MeanFlow(OFFICIAL, samples), 0.0, 200
        for step in range(steps):
            rows += planner.sizes(planner.drawn(0, step, 0))[1] / steps
        total = (none + (rows / samples - 1) * (all_rows - none)) / forward
        assert bar - 0.03 < total <= bar, total


# --- draws and options ---


def test_drawn_guidance():
    config, draws = replace(OFFICIAL, omega_power=2.0), Draws(3, 5, torch.arange(20_000))
    equal = torch.arange(20_000) < 10_000
    omega, start, end = draw_guidance(config, draws, equal)
    # the density falls with omega^-2 on [1, 8]
    assert stats.kstest(omega, lambda w: (1 - 1 / w) / (1 - 1 / 8)).pvalue > 0.01
    uniform = draw_guidance(OFFICIAL, draws, equal).omega.log() / torch.tensor(8.0).log()
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert (start[equal] == 0).all() and (end[equal] == 1).all()
    assert stats.kstest(2 * start[~equal], "uniform").pvalue > 0.01
    assert stats.kstest(2 * end[~equal] - 1, "uniform").pvalue > 0.01
    # streams of their own: MeanFlow's draws stay
    assert torch.equal(draws.uniform(Purpose.LABEL_DROP), Draws(3, 5, torch.arange(20_000)).uniform(Purpose.LABEL_DROP))
    for x in (start[~equal], end[~equal]):
        assert abs(torch.corrcoef(torch.stack([omega[~equal], x]))[0, 1]) < 0.04


def test_options_that_do_not_go_together():
    for options in ({"omega": 2.0}, {"kappa": 0.5}, {"guidance_end": 0.5}):
        with pytest.raises(UserError, match="objective.guidance_input: got 'interval', wanted none where"):
            replace(OFFICIAL, **options)
    with pytest.raises(UserError, match="objective.omega_max: got 1.0, wanted a number above 1"):
        replace(OFFICIAL, omega_max=1.0)
