"""Timing variants against each other: none that is wrong, a row for each that fails, the others with their pairs."""

import argparse
import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step
from benchmarks.harness import turns
from benchmarks.workloads import step_timer, step_variants, step_workload
from benchmarks.workloads.step_variants import LEFT_OUT, VARIANTS, left_out, same_as

SMALL = "--device cpu --model S/8 --batch 8 --precision fp32 --repeats 2".split()

pytestmark = pytest.mark.usefixtures("narrow")


def workload(*more):
    parser = argparse.ArgumentParser()
    step_workload.add_workload_arguments(parser)
    return step_workload.make_workload(parser.parse_args([*SMALL, *more]))


def compare(tmp_path, names: str, *more) -> tuple[int, dict[str, dict]]:
    """The exit code and the rows by variant."""
    path = tmp_path / "rows.jsonl"
    code = step.main([*SMALL, *more, "--compare", names, "--rows", str(path)])
    return code, {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}


# --- the variants ---


def test_every_variant_says_what_it_leaves_out():
    named = {name for name in VARIANTS if left_out(name)}
    more = {"ours-captured", "ours-captured-replicated"}
    assert set(VARIANTS) - named == {"naive", "naive-compiled", "ours"} | more
    assert {left_out(name) for name in named} == set(LEFT_OUT.values())
    # each ingredient, compiled and eager
    assert {name.replace("ours-", "ours-eager-", 1) for name in named if "eager" not in name} <= set(VARIANTS)


def test_ingredients_are_left_out():
    """What each variant's plan asks for on the same draws."""
    work = workload("--interval", "0", "0.5")
    inputs = work.inputs(0)
    plans = {}
    for name in ("ours-eager", "ours-eager-whole-batch", "ours-eager-whole-tangent", "ours-eager-no-primal-reuse"):
        variant = VARIANTS[name](work)
        variant.prepare(inputs)
        plans[name.removeprefix("ours-eager").removeprefix("-")] = variant.inputs.plan
    usual, whole, tangent, own = (plans[n] for n in ("", "whole-batch", "whole-tangent", "no-primal-reuse"))
    assert (len(usual.tangent), len(whole.tangent), len(tangent.tangent), len(own.tangent)) == (2, 8, 8, 2)
    assert len(whole.rows) == 16 and len(tangent.rows) < 16
    # a conditional row for every guided sample instead of the primal pass
    guided = usual.guided
    assert (usual.cond_row[: usual.tangent_start][guided[: usual.tangent_start]] == -1).all()
    assert torch.equal(own.guided, guided) and (own.cond_row[guided] >= 0).all() and len(own.rows) > len(usual.rows)


def test_kernels_are_left_out(monkeypatch):
    """The operators are asked for their reference while the step is made, and only then."""
    from meanflow_kernels import routing

    work, routes = workload(), []
    for name in ("ours-eager", "ours-eager-no-kernels"):
        variant = VARIANTS[name](work)
        variant.make_step = lambda inputs: routes.append(routing.forced.route)
        variant.prepare(work.inputs(0))
        variant.step()
    assert routes == [None, routing.Route.REFERENCE] and routing.forced.route is None


@pytest.mark.parametrize(
    ("name", "options", "device", "words"),
    [
        ("ours-no-kernels", (), "cpu", "the same step as ours: on a CPU"),
        ("ours-eager-no-kernels", (), "cpu", "the same step as ours-eager: on a CPU"),
        ("ours-no-kernels", (), "cuda", None),
        ("ours-no-primal-reuse", ("--kappa", "0"), "cuda", "without kappa"),
        ("ours-no-primal-reuse", (), "cpu", None),
        ("ours-whole-tangent", ("--share", "1"), "cpu", "every sample has r < t"),
        ("ours-whole-tangent", (), "cpu", None),
        ("ours", ("--kappa", "0"), "cpu", None),
    ],
)
def test_no_step_is_timed_twice(name, options, device, words):
    work = workload(*options)
    why = same_as(name, SimpleNamespace(run=work.run, device=device))
    assert why is None if words is None else words in why


# --- taking turns ---


def test_the_ablation_has_a_row_for_each(tmp_path, capsys):
    names = [name for name in VARIANTS if name.startswith("ours-eager")]
    code, rows = compare(tmp_path, ",".join(names), "--batch", "4", "--repeats", "1")
    assert code == 0 and set(rows) == set(names)
    for name, row in rows.items():
        assert row["compared"] == names
        if name.endswith("no-kernels"):
            assert row["ms"] is None and "the operators run as plain torch anyway" in row["missing"]["ms"]
        else:
            assert row["ms"] > 0 and row["samples"] == 1
            assert row["gradient_against"] == (None if name == "ours-eager" else "ours-eager")
            assert ("ours-eager" in row["times"]) == (name != "ours-eager")
    assert "ours-eager-no-kernels: not timed: the same step as ours-eager" in capsys.readouterr().out.splitlines()[-1]


class Stub(step_variants.Variant):
    """A step without work; ``fails`` at that call, counted from 0, with ``error``."""

    def __init__(self, work, *, fails=None, error=None, gradient=1.0):
        self.fails, self.error, self.found, self.calls = fails, error, gradient, 0
        if fails == -1:
            raise error

    def prepare(self, inputs):
        pass

    def step(self):
        self.calls += 1
        if self.fails == self.calls - 1:
            raise self.error

    def gradient(self):
        return torch.full((3,), self.found)


def stubs(monkeypatch, **options):
    """Stubs by name in the place of the variants."""
    monkeypatch.setattr(step_timer, "needed_flops", lambda run: 1e9)
    for name, how in options.items():
        monkeypatch.setitem(VARIANTS, name, lambda work, how=how: Stub(work, **how))


MEMORY = torch.OutOfMemoryError("CUDA out of memory")
WORDS = RuntimeError("memory: the step does not fit (...), wanted a smaller one")


@pytest.mark.parametrize("error", [MEMORY, WORDS, RuntimeError("[enforce] DefaultCPUAllocator: can't allocate")])
@pytest.mark.parametrize("when", [-1, 0, 2], ids=["built", "first step", "later step"])
def test_what_does_not_fit_costs_no_other(monkeypatch, tmp_path, capsys, when, error):
    stubs(monkeypatch, one={}, large={"fails": when, "error": error}, two={})
    code, rows = compare(tmp_path, "one,large,two")
    assert code == 0 and set(rows) == {"one", "large", "two"}
    assert rows["large"]["ms"] is None and rows["large"]["missing"] == {"ms": "out of memory"}
    # the others keep all their pairs
    assert rows["one"]["samples"] == rows["two"]["samples"] == 2 and rows["two"]["times"].keys() == {"one"}
    assert "large: not timed: out of memory" in capsys.readouterr().out


def test_a_slow_machine_takes_fewer_turns(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])

    def taken(seconds):
        found = []
        for turn in turns.turns(9, seconds):
            found.append(turn)
            now[0] += 10
        return found

    assert taken(math.inf) == list(range(9))
    # the sixth turn ends at 60 seconds
    assert taken(55) == list(range(6))
    # three are taken however long they last
    assert taken(1) == [0, 1, 2]


def test_the_first_may_be_the_one_that_does_not_fit(monkeypatch, tmp_path):
    stubs(monkeypatch, large={"fails": 0, "error": MEMORY}, one={}, two={})
    code, rows = compare(tmp_path, "large,one,two")
    assert code == 0 and rows["one"]["gradient_against"] is None and rows["two"]["gradient_against"] == "one"
    assert rows["two"]["times"].keys() == {"one"}


def test_another_failure_is_a_row_and_an_exit_code(monkeypatch, tmp_path):
    stubs(monkeypatch, one={}, broken={"fails": 0, "error": ValueError("no such\nthing")}, two={})
    code, rows = compare(tmp_path, "one,broken,two")
    assert code == 1 and rows["broken"]["missing"] == {"ms": "ValueError: no such"} and rows["two"]["samples"] == 2


def test_a_wrong_step_is_not_timed(monkeypatch, tmp_path):
    stubs(monkeypatch, one={}, wrong={"gradient": 1.01})
    with pytest.raises(SystemExit, match="wrong: its gradient is 1.00e-02 off one's, it was not timed"):
        compare(tmp_path, "one,wrong")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_wrong_gradient_of_the_real_step_is_found(monkeypatch, tmp_path):
    class Wrong(step_variants.Ours):
        def step(self):
            super().step()
            with torch.no_grad():
                self.net.final_layer.linear.bias.grad.mul_(1.5)

    monkeypatch.setitem(VARIANTS, "wrong", Wrong)
    with pytest.raises(SystemExit, match="wrong: its gradient is .* off ours-eager's, it was not timed"):
        compare(tmp_path, "ours-eager,wrong")


def test_a_captured_variant_compares_the_gradient_of_a_graph():
    """Its first step is made by hand and moves no weight; the second, of the same weights, is a graph's."""
    work, rates, gradients = workload(), [], []
    variant = step_variants.Ours(work, cuda_graph=True)
    by_hand = variant.make_step._run

    def make_step(inputs):
        by_hand((inputs,))
        rates.append(variant.optimizer.param_groups[0]["lr"].item())
        gradients.append(variant.gradient())

    variant.make_step = make_step
    variant.prepare(work.inputs(0))
    variant.first_step()
    assert rates == [0, pytest.approx(work.run.optim.lr)] and torch.equal(*gradients)
    variant.step()
    assert not torch.equal(*gradients[1:])


# --- alone on the GPU: the order of events, on a CPU ---


@pytest.fixture
def no_gpu(monkeypatch):
    """What ``in_turn`` asks of a GPU, answered without one."""
    for name, answer in {
        "reset_peak_memory_stats": None, "max_memory_allocated": 7, "max_memory_reserved": 9, "empty_cache": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)


def test_alone_each_row_is_there_before_the_next_starts(monkeypatch, no_gpu):
    stubs(monkeypatch, one={}, large={"fails": 2, "error": MEMORY}, two={}, wrong={"gradient": 2.0})
    rows = step_timer.in_turn(workload(), ["one", "large", "two", "wrong", "never"], 3)
    one = next(rows)
    assert (one["variant"], one["samples"], one["peak_bytes"], one["reserved_bytes"]) == ("one", 3, 7, 9)
    assert one["missing"]["joules_per_image"]
    assert next(rows)["missing"] == {"ms": "out of memory"}
    two = next(rows)
    assert two["variant"] == "two" and two["times"].keys() == {"one"} and two["gradient_against"] == "one"
    with pytest.raises(SystemExit, match="wrong: its gradient"):
        next(rows)


def test_each_is_held_against_one_that_is_not_timed(monkeypatch, tmp_path):
    stubs(monkeypatch, first={}, same={}, other={"gradient": 2.0}, broken={"fails": 0, "error": MEMORY})
    code, rows = compare(tmp_path, "same", "--against", "first")
    assert code == 0 and rows.keys() == {"same"}
    assert rows["same"]["gradient_against"] == "first" and rows["same"]["gradient_difference"] == 0
    assert len(rows["same"]["step_ms"]) == rows["same"]["samples"] and not rows["same"]["times"]
    with pytest.raises(SystemExit, match="same: its gradient is .* off other's"):
        compare(tmp_path, "same", "--against", "other")
    with pytest.raises(SystemExit, match="--against: got broken, which cannot be a reference here"):
        compare(tmp_path, "same", "--against", "broken")


def test_a_failed_variant_leaves_nothing_in_memory():
    import gc
    import weakref

    kept = []

    class Large:
        pass

    def fail():
        large = Large()
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room")

    assert turns.attempt(fail) == (None, turns.Reason("out of memory", failed=False))
    gc.collect()
    assert kept[0]() is None
