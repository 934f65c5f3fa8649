"""Improved MeanFlow in the stopwatch: its step counted, timed and broken down like any other."""

import argparse
import json
import re
from dataclasses import replace

import pytest

from benchmarks import accounting, breakdown, recipes, step
from benchmarks.counting.accounts import account
from benchmarks.counting.floor import least_bytes, measured_step
from benchmarks.counting.step_kernels import count_calls
from benchmarks.harness.rows import objective_columns, objective_words
from benchmarks.workloads import step_variants
from benchmarks.workloads.step_workload import add_workload_arguments, initial_weights, make_workload
from meanflow import recipe
from meanflow.config import ObjectiveConfig
from meanflow.presets import IMPROVED, preset
from meanflow.recipe import IMF_SIZES

BARS = {"B": (6.80, 6.82), "M": (5.80, 5.82), "L": (5.55, 5.57), "XL": (5.30, 5.32)}
SMALL = "--device cpu --preset imf-xl2 --batch 4 --precision fp32 --repeats 1".split()


@pytest.fixture
def narrow(monkeypatch):
    """Two narrow blocks, one of them u's own, in the place of XL's 48."""
    monkeypatch.setattr(recipe, "IMF_HEAD_DEPTH", 1)
    for size in IMF_SIZES:
        monkeypatch.setitem(recipe.IMF_SIZES, size, (2, 32, 2))


def workload(*more):
    parser = argparse.ArgumentParser()
    add_workload_arguments(parser)
    return make_workload(parser.parse_args([*SMALL, *more]))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 128])
@pytest.mark.parametrize("size", BARS)
def test_a_step_stays_below_its_bar(size, batch):
    run = preset(f"imf-{size.lower()}2")
    accounts = account(replace(run, train=replace(run.train, batch=batch, precision="bf16")), batches=200)
    assert accounts["step_in_forwards_unrepeated"] <= BARS[size][batch > 32] < accounts["step_in_forwards"] + 0.03
    assert accounts["saved_bytes"] <= 1.02 * accounts["saved_bytes_flow_matching"]


def test_accounts(narrow, capsys):
    accounting.main("--preset imf-b2 --batch 32 --batches 20".split())
    text = capsys.readouterr().out
    assert "padded without what attention's backward computes again" in text and "measured step" not in text
    run = preset("imf-b2")
    run = replace(run, train=replace(run.train, batch=32, precision="bf16"))
    accounts = account(run, batches=20)
    passes = accounts["parts"]
    assert f"{accounts['step_in_forwards_unrepeated']:.4f} padded without" in text
    # four of the five products of attention's backward, of two in a pass that goes forward
    assert passes["backward"]["attention"] == 2.5 * passes["primal"]["attention"]
    repeated = passes["primal"]["attention"] / 2 / accounts["forward_flops"]
    assert accounts["step_in_forwards_unrepeated"] == pytest.approx(accounts["step_in_forwards"] - repeated, rel=1e-12)
    # a block of v's own beside the two to u; the derivative of half of the samples, to u alone
    assert passes["primal"]["attention"] == 3 * 32 * 276**2 * 32 * 4
    assert passes["tangent"]["attention"] == 2 / 2 * 2 * accounts["forward_attention_flops"] / 2
    # both of them with both heads
    assert accounts["saved_bytes"] <= 1.02 * accounts["saved_bytes_flow_matching"]
    moved = least_bytes(run, accounts)
    # each block's operators read and write the stream of the batch several times
    assert moved["pointwise operators"] > 3 * 32 * 276 * 32 * 4 * 10


def test_the_step_beside_its_twin(narrow, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    names = ["naive", *(name for name in step_variants.VARIANTS if name.startswith("ours-eager"))]
    names.remove("ours-eager-no-kernels")
    assert step.main([*SMALL, "--compare", ",".join(names), "--rows", str(rows)]) == 0
    found = {row["variant"]: row for row in rows_of(rows)}
    assert found.keys() == set(names) and all(row["ms"] > 0 for row in found.values())
    assert all(found[name]["gradient_against"] == "naive" for name in names[1:])
    row = found["naive"]
    assert (row["direction"], row["guidance_input"], row["share"], row["preset"]) == (
        "v_head",
        "interval",
        0.5,
        "imf-xl2",
    )
    assert "fp32, omega and interval drawn, along v, r != t 50%, CPU" in capsys.readouterr().out
    # every gate lets something through
    weights = initial_weights(preset("imf-xl2").model, "cpu")
    gates = [x for name, x in weights.items() if "gate_" in name]
    assert len(gates) == 6 and all(gate.abs().max() > 0.1 for gate in gates)


def test_an_ingredient_is_left_out(narrow):
    """What each variant's plan asks for on the same draws."""
    work = workload("--batch", "16")
    sizes = {}
    for name in ("ours-eager", "ours-eager-whole-batch", "ours-eager-whole-tangent", "ours-eager-no-primal-reuse"):
        variant = step_variants.VARIANTS[name](work)
        variant.prepare(work.inputs(0))
        plan = variant.inputs.plan
        sizes[name.removeprefix("ours-eager").removeprefix("-")] = len(plan.rows), len(plan.tangent)
        assert plan.sizes in variant.objective.declared
    assert sizes["whole-batch"] == (32, 16) and sizes["whole-tangent"][1] == 16 and sizes[""][1] == 8
    assert sizes[""][0] < sizes["no-primal-reuse"][0] <= 32
    assert step_variants.same_as("ours-eager-no-primal-reuse", work) is None


def test_breakdown(narrow):
    work = workload()
    phases = breakdown.by_phase(work, 1, compiled=False)
    assert phases.keys() == {"draw", "guidance", "primal", "tangent", "backward", "optimizer"}
    assert phases["primal"] > 0 and phases["backward"] > 0
    counted = count_calls(work.run, [work.inputs(0).plan])
    # three blocks, the one of v without a tangent; guidance runs through two
    calls = {name: counted[name].calls for name in ("qk_rope", "qk_rope_jvp", "qk_rope_bwd", "swiglu_bwd")}
    assert calls == {"qk_rope": 3, "qk_rope_jvp": 2, "qk_rope_bwd": 3, "swiglu_bwd": 3}
    assert {"attention_jvp", "attention_bwd", "gate_rmsnorm_jvp", "rmsnorm_bwd", "adamw_ema"} < counted.keys()


def test_recipes(narrow, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "BATCHES", 10)
    recipes.main(["--presets", "imf-b2"])
    text = capsys.readouterr().out
    # the batch of 1,024 on 8 GPUs, 640 epochs of 1,251 steps, and the paper's FID
    assert re.search(r"imf-b2 +0 M +128 .* 800,640 .* - +3\.39", text), text
    assert set(recipes.RECIPES) > {"imf-b2", "imf-m2", "imf-l2", "imf-xl2"}


def test_rows_tell_objectives_apart(tmp_path):
    """A step along the predicted velocity is no step of MeanFlow's own, whose rows have not these columns."""
    usual = objective_columns(ObjectiveConfig())
    assert usual["direction"] is usual["guidance_input"] is None
    words = objective_words(objective_columns(replace(IMPROVED, guidance_input="omega", direction="boundary")))
    assert list(words.values()) == ["omega drawn", "along u(z, t, t)", "r != t 50%"]
    run = preset("ladder-boundary-guided")
    run = replace(run, train=replace(run.train, batch=32, precision="bf16"))
    row = {"gpu": "mine", "model": "B/2", "tokens": 256, "batch": 32, "precision": "bf16", "omega": 1.0, "kappa": 0.5}
    row |= {"interval": [0.0, 1.0], "share": 0.25, "images_per_second": 1.0, "variant": "ours", "ms": 9.0}
    row |= {"commit": "a", "date": "2026-01-01"}
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert measured_step(run, "mine", results=tmp_path) is None
    assert measured_step(replace(run, objective=replace(run.objective, direction="guided")), "mine", results=tmp_path)
