"""Objectives compared at equal FLOPs: budgets, what is not repeated, table and picture."""

import json
from dataclasses import replace

import pytest
import runs
from PIL import Image

from meanflow.apps import compare
from meanflow.presets import PRESETS, preset
from meanflow.training.flops import sample_flops
from meanflow.training.trainer import train


@pytest.fixture
def quick(monkeypatch):
    """Tiny networks and a judge that learns for one epoch: what it says is not looked at."""
    monkeypatch.setattr("meanflow.evaluation.classifier.CLASSIFIER_EPOCHS", {"digits": 1})
    monkeypatch.setattr(compare, "preset", runs.tiny)
    monkeypatch.setattr(compare, "OMEGAS", (1.0, 2.0))
    monkeypatch.setattr(compare, "STEPS_OF_SAMPLES", (2,))


def test_a_budget_is_the_same_for_all():
    base = preset("digits")
    budget = base.train.steps * compare.flops_of_step(base)
    name, configs = compare.configs_of(compare.Options(objectives=("imf", "shortcut", "meanflow")))
    assert name == f"digits-{budget:.3g}flops".replace("+", "") and configs["meanflow"].train.steps == base.train.steps
    for config in configs.values():
        assert config.train.steps * compare.flops_of_step(config) == pytest.approx(budget, rel=1e-3)
    halved = compare.configs_of(compare.Options(objectives=("meanflow",), budget_flops=budget / 2))[1]
    assert halved["meanflow"].train.steps == base.train.steps // 2
    assert {c.train.steps for c in compare.configs_of(compare.Options(steps=7))[1].values()} == {7}


def test_the_flops_of_a_step():
    config = preset("digits")
    f = sample_flops(config.model)
    # half of the samples have r < t, and nothing is guided
    assert compare.flops_of_step(config) == pytest.approx(64 * (f.primal + f.backward + f.tangent / 2))
    imf = preset("imf-b2")
    imf = replace(imf, train=replace(imf.train, batch=32))
    assert compare.flops_of_step(imf) / (32 * sample_flops(imf.model).forward) == pytest.approx(6.83, rel=0.01)


def test_figures_are_those_of_the_presets():
    published = {name: entry.published for name, entry in compare.ENTRIES.items()}
    of = {
        "meanflow": "imagenet-b2",
        "imf": "ladder-modern",
        "imf-tokens": "ladder-modern",
        "flow-matching": "table1a-0",
    }
    of |= {"soflow": "imagenet-soflow-b2", "shortcut": "imagenet-shortcut-b2", "ict": "imagenet-ict-xl2"}
    of |= {"imm": "imagenet-imm-xl2", "alpha-flow": "imagenet-alpha-flow-b2"}
    assert published == {name: PRESETS[other].fid for name, other in of.items()} | {"scm": None}


@pytest.mark.parametrize("data, seeds", {"digits": 3, "fashion": 1}.items())
def test_all_objectives_are_compared_on_all_data(data, seeds):
    name, configs = compare.configs_of(compare.Options(data, path="somewhere", steps=7))
    assert list(configs) == list(compare.ENTRIES) and len(compare.DATA[data].seeds) == seeds and name.startswith(data)
    assert {(config.data.name, config.data.path) for config in configs.values()} == {(data, "somewhere")}
    # improved MeanFlow alone has another learning rate
    assert len({compare.in_words(config.optim) for name, config in configs.items() if "imf" not in name}) == 1


def test_costs_are_the_objectives_own():
    """In forwards: 3 for the trained pass, the others by their share of the samples."""
    forwards = {}
    for name in ("soflow", "shortcut", "ict", "scm", "imm", "alpha-flow"):
        config = preset(f"digits-{name}")
        forwards[name] = compare.flops_of_step(config) / (64 * sample_flops(config.model).forward)
    shortcut = preset("digits-shortcut").objective
    wanted = {"soflow": 3.25, "shortcut": 3 + 2 / shortcut.bootstrap_every, "ict": 4, "scm": 4, "imm": 4}
    # half of the samples have another pass, or a derivative, from 60 % of the run on
    wanted["alpha-flow"] = 3 + 0.4 * 0.5
    assert forwards == pytest.approx(wanted, rel=0.03)


def test_a_killed_comparison_goes_on(command, quick, tmp_path, monkeypatch):
    args = ["--objectives", "meanflow", "imf", "--steps", 3, "--seeds", 0, 1, "--out", tmp_path]
    folder, trained = tmp_path / "digits-3steps", []

    def dies(config, out):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(out.name)
        return train(config, out)

    with monkeypatch.context() as accident, pytest.raises(KeyboardInterrupt):
        accident.setattr("meanflow.training.trainer.train", dies)
        compare.main([*map(str, args)])
    assert trained == ["meanflow-seed0", "meanflow-seed1", "imf-seed0"] and not list(folder.glob("table*"))
    logs = {name: (folder / name / "log.jsonl").read_text() for name in trained}
    code, text, err = command("compare", *args)
    assert code == 0, err
    assert logs == {name: (folder / name / "log.jsonl").read_text() for name in trained}  # not trained again

    table, result = (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())
    assert table in text and Image.open(folder / "picture.png").size[0] > 1000
    imf = result["entries"]["imf"]
    assert len(imf["samples"]["2"]["scores"]) == 2
    assert {row["guidance"][0] for row in imf["samples"]["2"]["tried"]} == {1.0, 2.0}
    assert imf["cpu_seconds"] > 0 and imf["steps"] == 3 and "3.82 | B/2, 240 epochs, iMF's paper" in table


def test_a_signal_stops_a_comparison(command, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("meanflow.training.trainer.train", lambda config, out: 143)
    assert command("compare", "--steps", 3, "--out", tmp_path)[0] == 143
    assert not list(tmp_path.rglob("table*"))


@pytest.mark.parametrize("args, message", {
    "--objectives meanflow sit": "objectives: got 'sit', wanted some of meanflow imf imf-tokens flow-matching soflow",
    "--objectives imf --budget-flops 1e3": "budget_flops: got 1000.0, wanted enough for a step of each objective",
    "--budget-flops 1e12 --steps 3": "steps: got 3, wanted steps or budget_flops, not both",
}.items())  # fmt: skip
def test_bad_input_to_compare(command, tmp_path, args, message):
    code, _, err = command("compare", *args.split(), "--out", tmp_path / "out")
    assert code == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
