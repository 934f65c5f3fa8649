"""The accounts of a step: the bars that it must stay below, and that the counts are counts of what runs."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import accounting
from benchmarks.counting.accounts import (
    BACKWARD,
    TANGENT,
    TRAINED,
    Flops,
    MetaStep,
    Proportional,
    account,
    count,
    saved_bytes,
)
from benchmarks.counting.floor import find_rates, floor, least_bytes, measured_step
from meanflow.config import ModelConfig, RunConfig
from meanflow.draws import Draws
from meanflow.errors import UserError
from meanflow.method.passes import func_jvp
from meanflow.objectives.meanflow import MeanFlow
from meanflow.objectives.meanflow_plan import Drawn, whole_batch
from meanflow.presets import preset
from meanflow.training.flops import sample_flops
from meanflow.training.peaks import PEAKS
from meanflow_kernels.routing import Route, force_route

BARS = {  # overrides of XL/2's own objective, most F a step
    "unguided": ({"omega": 1.0, "kappa": 0.0}, 3.30),
    "guided everywhere": ({"guidance_start": 0.0, "guidance_end": 1.0}, 4.58),
    "own recipe": ({}, 4.40),
}
NAMES = ["unguided", pytest.param("guided everywhere", marks=pytest.mark.slow), "own recipe"]
BATCHES = [32, pytest.param(256, marks=pytest.mark.slow)]


def xl2(batch: int, **objective) -> RunConfig:
    config = preset("imagenet-xl2")
    objective = replace(config.objective, **objective)
    return replace(config, objective=objective, train=replace(config.train, batch=batch, precision="bf16"))


def tiny(**objective) -> RunConfig:
    config = preset("digits")
    objective = replace(config.objective, **{"share_equal": 0.75, "omega": 0.2, "kappa": 0.5} | objective)
    model, train = replace(config.model, depth=1), replace(config.train, batch=8)
    return replace(config, model=model, objective=objective, train=train)


@functools.cache
def accounts_of_xl2(batch: int, bar: str) -> dict:
    return account(xl2(batch, **BARS[bar][0]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bar", NAMES)
def test_a_step_of_xl2_stays_below_its_bar(bar, batch):
    config, accounts, most = xl2(batch, **BARS[bar][0]), accounts_of_xl2(batch, bar), BARS[bar][1]
    assert accounts["batches"] == 1000 and config.objective.share_equal == 0.75
    assert accounts["step_in_forwards"] <= most
    if bar != "own recipe":
        # whatever is drawn
        assert max(size["forwards"] for size in accounts["sizes"]) <= most
    assert accounts["step_in_forwards_unpadded"] <= accounts["step_in_forwards"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bar", NAMES)
def test_nothing_is_saved_for_the_derivative_or_guidance(bar, batch):
    accounts = accounts_of_xl2(batch, bar)
    assert accounts["saved_bytes"] <= 1.02 * accounts["saved_bytes_flow_matching"]
    # a stream in fp32, 28 blocks of two branches
    assert accounts["saved_bytes_flow_matching"] > batch * 256 * 1152 * 4 * 28 * 2


@pytest.mark.parametrize("bar", NAMES)
def test_passes_are_the_whole(bar):
    accounts = accounts_of_xl2(32, bar)
    passes = accounts["parts"]
    for key in ("flops", "linear", "attention", "forwards"):
        assert sum(each[key] for each in passes.values()) == pytest.approx(accounts["step"][key], rel=1e-12)
    assert accounts["step"]["forwards"] == accounts["step_in_forwards"]
    for name, each in passes.items():
        # the kernels' operators have been counted, not overlooked
        assert (each["attention"] > 0) == (each["linear"] > 0) == (name != "guidance" or bar != "unguided"), name
    assert passes["primal"]["flops"] == accounts["forward_flops"]
    # a flash backward is 2.5 forwards, the derivative of a quarter of the samples twice theirs
    assert passes["backward"]["attention"] == 2.5 * passes["primal"]["attention"]
    assert passes["tangent"]["attention"] == 2 / 4 * passes["primal"]["attention"]


@pytest.mark.parametrize("model, gmacs", {"B/4": 5.6, "B/2": 23.1, "M/2": 54.0, "L/2": 80.9, "XL/2": 119.0}.items())
def test_forward_is_the_papers(model, gmacs):
    config = replace(tiny(), model=ModelConfig.official(model))
    counted = MetaStep(config).plain_forward().total / config.train.batch / 2e9
    assert counted == pytest.approx(gmacs, rel=0.01)


def test_passes_are_proportional_to_their_rows():
    step = MetaStep(tiny(equal_placement="bernoulli"))
    declared, proportional = step.objective.declared, Proportional(step)
    assert len(declared) > 5 * 5
    for tangents, rows in declared[::3]:
        counted, found = step.parts((tangents, rows)), proportional.parts((tangents, rows))
        assert counted.keys() == found.keys() == {"guidance", TRAINED, TANGENT, BACKWARD}
        for part, flops in found.items():
            assert (flops.linear, flops.attention) == pytest.approx((counted[part].linear, counted[part].attention))
        # and what is counted pass by pass is the step
        whole = count(lambda sizes=(tangents, rows): step.loss(step.objective.example(sizes)).backward())
        assert sum(counted.values(), Flops()) == whole
    assert proportional.parts((0, 0))["guidance"] == proportional.parts((0, 0))[TANGENT] == Flops()


def drawn(config: RunConfig, step: int, rank: int = 0) -> Drawn:
    """What is drawn for a rank's batch."""
    batch = config.train.batch
    draws = Draws(config.train.seed, step, torch.arange(batch) + rank * batch)
    return MeanFlow(config.objective, batch).draw(draws)


@pytest.mark.parametrize("placement", ["first", "bernoulli"])
def test_means_are_those_of_the_drawn_steps(placement):
    config = tiny(equal_placement=placement, guidance_end=0.5, label_drop=0.3)
    ranks, batches = 3, 4
    accounts = account(config, ranks=ranks, batches=batches)
    step = MetaStep(config)

    def forwards(index, rank, exact=False):
        plan = step.objective.plan(drawn(config, index, rank), exact=exact)
        return count(lambda: step.loss(plan).backward()).total / accounts["forward_flops"]

    padded = [[forwards(index, rank) for rank in range(ranks)] for index in range(batches)]
    assert len({n for of_ranks in padded for n in of_ranks}) > 2
    assert accounts["step_in_forwards"] == pytest.approx(sum(p[0] for p in padded) / batches, rel=1e-12)
    assert accounts["step_in_forwards_slowest_rank"] == pytest.approx(sum(map(max, padded)) / batches, rel=1e-12)
    unpadded = sum(forwards(index, 0, exact=True) for index in range(batches)) / batches
    assert accounts["step_in_forwards_unpadded"] == pytest.approx(unpadded, rel=1e-12)
    assert unpadded < accounts["step_in_forwards"] < accounts["step_in_forwards_slowest_rank"]
    assert sum(size["batches"] for size in accounts["sizes"]) == batches


@pytest.mark.parametrize("placement", ["first", "bernoulli"])
def test_exact_sizes_have_no_padding(placement):
    config = tiny(equal_placement=placement, guidance_end=0.5, label_drop=0.3)
    objective = MeanFlow(config.objective, config.train.batch)
    for index in range(20):
        r, t, drop, _ = of_batch = drawn(config, index)
        guided = (t <= 0.5) & ~drop
        needed = int(guided.sum() + (guided & (r != t)).sum())
        assert objective.sizes(of_batch, exact=True) == (int((r != t).sum()), needed)


@pytest.mark.parametrize("name", ["digits", "digits-imf"])
def test_a_runs_recorded_flops_are_those_of_its_step(name):
    config = tiny() if name == "digits" else preset(name)
    config = replace(config, train=replace(config.train, batch=8))
    step = MetaStep(config)
    for index in range(3):
        plan = step.objective.plan(drawn(config, index), exact=True)
        counted = count(lambda plan=plan: step.loss(plan).backward()).total
        found = sample_flops(config.model).of_passes(step.objective.passes(plan.sizes))
        assert found == pytest.approx(counted, rel=1e-12)


def test_saved_bytes_of_a_known_graph():
    layer = nn.Linear(8, 8)

    def loss():
        x = torch.ones(4, 8, requires_grad=True)
        torch.ones(1000, requires_grad=True).exp().sum()  # a graph that nobody keeps
        y = layer(x).exp()  # x and the result are kept; the weight too, but it is no news
        y = y.view(8, 4) * y.view(8, 4)  # the same memory, seen in two ways
        return y.sum()

    assert saved_bytes(loss, layer) == 2 * 4 * 8 * 4


def test_a_target_that_is_not_stopped_is_seen():
    step = MetaStep(tiny())
    plan = whole_batch(step.config.objective, *drawn(step.config, 0))

    def not_stopped():
        def jvp(net, primals, tangents, others, start):
            with force_route(Route.REFERENCE):
                u, du_dt = func_jvp(net, primals, tangents, others, start)
            return u + du_dt.sum(), du_dt

        return step.loss(plan, jvp=jvp)

    assert saved_bytes(not_stopped, step.net) > 1.8 * account(step.config, batches=1)["saved_bytes"]


def test_weights_and_optimizer():
    accounts = account(tiny(), batches=1)
    count = accounts["parameters"]
    assert count == sum(p.numel() for p in MetaStep(tiny()).net.parameters())
    assert accounts["parameter_bytes"] == 4 * count
    # parameter, gradient, two moments and the average are read, all but the gradient written
    assert (accounts["optimizer_bytes"], accounts["optimizer_state_bytes"]) == (9 * 4 * count, 3 * 4 * count)


def write_rows(folder, gpu: str, **ceilings):
    folder.mkdir(parents=True)
    rows = [{"gpu": gpu, "bound": bound, "ceiling": ceiling} for bound, of in ceilings.items() for ceiling in of]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rates_are_given_measured_or_the_datasheets(tmp_path):
    gpu, peak = "NVIDIA H200", PEAKS["NVIDIA H200"]

    def found(gpu=gpu, **given):
        return [(rate.value, rate.source) for rate in find_rates(gpu, results=tmp_path, **given)]

    assert found() == [(peak.tflops, "datasheet"), (peak.gbps, "datasheet")]
    write_rows(tmp_path / "other", "NVIDIA B200", gemm=[1500.0], copy=[7000.0])
    assert found() == [(peak.tflops, "datasheet"), (peak.gbps, "datasheet")]
    write_rows(tmp_path / "h200", gpu, gemm=[700.0, None, 720.0])
    assert found() == [(720.0, "measured"), (peak.gbps, "datasheet")]
    assert found(copy_gbps=4000.0) == [(720.0, "measured"), (4000.0, "given")]
    assert found("mine", gemm_tflops=1.0, copy_gbps=2.0) == [(1.0, "given"), (2.0, "given")]
    with pytest.raises(UserError, match="gpu: got 'mine', wanted one of NVIDIA A100"):
        found("mine", gemm_tflops=1.0)


@pytest.mark.parametrize(
    ("here", "of"),
    {None: "NVIDIA H200", "NVIDIA H100 80GB HBM3": "NVIDIA H100 80GB HBM3", "a GPU": "NVIDIA H200"}.items(),
)
def test_the_floor_is_of_the_gpu_that_is_here(monkeypatch, here, of):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: here)
    assert accounting.arguments("--preset digits --batch 8".split()).gpu == of


def test_floor_is_products_and_bytes(tmp_path):
    gemm, copy = find_rates("mine", gemm_tflops=200.0, copy_gbps=1000.0, results=tmp_path)
    accounts = floor({"linear": 4e12, "attention": 1e12}, {"optimizer": 3e9}, "mine", gemm, copy)
    assert accounts["floor_ms"] == 20 + 5 + 3
    assert [kind["ms"] for kind in accounts["floor"]["kinds"].values()] == [20, 5, 3]


def test_bytes_of_the_floor_by_hand():
    config = tiny(omega=1.0, kappa=0.0, label_drop=0.0, share_equal=1.0)
    model, rows = config.model, 8 * config.model.tokens
    moved = least_bytes(config, {"sizes": [{"sizes": (0, 0), "batches": 3}]})
    net = MetaStep(config).net
    numbers = [p.numel() for p in net.parameters()]
    assert moved["gradient's norm"] == 4 * sum(numbers) and moved["optimizer"] == 36 * sum(numbers)
    # rows of adaln, of two gate_adaln (the last's x_out has no gradient) and of bias_gelu, four times as wide, forward
    # and backward: vectors of a sample are small beside them
    of_rows = (2 + 3) + (2 * 4 + 6 + 5) + 4 * (2 + 3)
    assert moved["pointwise operators"] == pytest.approx(4 * rows * model.hidden_size * of_rows, rel=0.1)


def test_the_measured_step_is_the_newest(tmp_path):
    config = xl2(32, omega=1.0, kappa=0.5, guidance_start=0.0, guidance_end=1.0)
    row = {"gpu": "mine", "model": "XL/2", "tokens": 256, "batch": 32, "precision": "bf16", "omega": 1.0, "kappa": 0.5}
    row |= {"interval": [0.0, 1.0], "share": 0.25, "images_per_second": 1.0}
    rows = [
        row | {"variant": "ours-captured", "ms": 80.0, "commit": "a", "date": "2026-01-01"},
        row | {"variant": "ours-captured", "ms": 82.0, "commit": "b", "date": "2026-01-02"},
        row | {"variant": "ours", "ms": 99.0, "commit": "b", "date": "2026-01-03"},
        row | {"variant": "naive", "ms": 50.0, "commit": "b", "date": "2026-01-03"},
        row | {"variant": "ours", "ms": 9.0, "commit": "c", "date": "2026-01-04", "kappa": 0.0},
    ]
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured_step(config, "mine", results=tmp_path)["ms"] == 82.0
    assert measured_step(config, "another", results=tmp_path) is None


@pytest.fixture
def command(capsys):
    """Run the command in this process: exit code, output, error output."""

    def run(*args: object) -> tuple[int, str, str]:
        code = 0
        try:
            accounting.main([*map(str, args)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_command(command, tmp_path):
    path = tmp_path / "new" / "accounts.json"
    args = ["--preset", "digits", "--batch", 64, "--batches", 5, "--ranks", 2]
    code, out, err = command(*args, "--json", path, "--gemm-tflops", 500, "--copy-gbps", 2000)
    assert code == 0, err
    accounts = json.loads(path.read_text())
    keys = "forward_flops step_in_forwards step_in_forwards_unpadded step_in_forwards_slowest_rank parts saved_bytes "
    keys += "saved_bytes_flow_matching parameters parameter_bytes optimizer_bytes floor_ms floor environment"
    assert set(keys.split()) <= accounts.keys()
    assert accounts["floor"]["gemm_source"] == "given" and accounts["precision"] == "bf16"
    assert [line.split()[0] for line in out.splitlines()[1:7]] == ["pass", *accounts["parts"], "step"]
    assert "500 TFLOP/s (given)" in out and "slowest of 2 ranks" in out
    assert "100%" in err  # progress
    code, out, _ = command(*args, "--precision", "fp32")
    assert code == 0 and "no rate of fp32 products is known" in out


@pytest.mark.parametrize(
    "line, message",
    {
        "--preset digitz --batch 8": "preset: got 'digitz', wanted a preset, of which 'digits'",
        "--preset digits --batch 0": "train.batch: got 0, wanted a positive whole number",
        "--preset imagenet-xl2 --batch 3": "train.batch: got 3, wanted one that a share of r = t of 0.75 divides",
        "--preset digits --batch 8 --gpu GTX": "gpu: got 'GTX', wanted one of NVIDIA A100",
        "--preset digits --batch 8 --ranks 0": "ranks: got 0, wanted a positive whole number",
        "--preset digits --batch 8 --batches 0": "batches: got 0, wanted a positive whole number",
        "--preset digits --batch 8 --gemm-tflops -1": "gemm-tflops: got -1.0, wanted a positive number",
        "--preset digits": "--batch",
        "--preset digits --batch 8 --fast": "unrecognized arguments: --fast",
    }.items(),
)
def test_bad_input(command, line, message):
    code, _, err = command(*line.split())
    assert code == 2
    last = err.splitlines()[-1]
    assert message in last and last.startswith("benchmarks.accounting: error: ")
