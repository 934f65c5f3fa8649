"""Runs of all objectives by the commands: trained, sampled, evaluated, exported; what is not there is refused."""

import json

import numpy as np
import pytest
import runs
import torch

from meanflow.draws import Draws
from meanflow.interop.weights import load_ema
from meanflow.method.sampling import even_times, generate
from meanflow.training.trainer import train

NAMES = ("soflow", "shortcut", "ict", "scm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of each."""
    folder = tmp_path_factory.mktemp("family")
    for name in NAMES:
        assert train(runs.tiny(f"digits-{name}", steps=2), folder / name) == 0
    return folder


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A judge of its own that learns for one epoch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("meanflow.evaluation.classifier.CLASSIFIER_EPOCHS", {"digits": 1})


@pytest.mark.parametrize("name", NAMES)
def test_sampled_and_evaluated(command, quick, trained, tmp_path, name):
    run, cpu = trained / name, torch.device("cpu")
    net, *_ = load_ema(run, cpu)
    for steps in (1, 2, 4):
        out = tmp_path / str(steps)
        assert command("sample", run, "--steps", steps, "--count", 3, "--batch", 2, "--out", out)[0] == 0
        wanted = generate(net, Draws(0, 0, torch.arange(3)), (1, 8, 8), torch.arange(3), even_times(steps))
        pixels = np.load(out.with_suffix(".npz"))["images"][..., 0]
        np.testing.assert_allclose(pixels, (wanted.clamp(-1, 1)[:, 0] + 1) * 127.5, atol=0.51)
    code, out, err = command("evaluate", run, "--steps", 1, 2, 4, "--json")
    assert code == 0, err
    assert [row["evaluations"] for row in json.loads(out)] == [1, 2, 4]
    assert len({row["frechet"] for row in json.loads(out)}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_exported(command, trained, tmp_path, name):
    file = tmp_path / "weights.safetensors"
    assert command("export", trained / name, "--out", file)[0] == 0
    (net, config, *_), (wanted, held, *_) = (load_ema(path, torch.device("cpu")) for path in (file, trained / name))
    assert config == held
    draws, y = Draws(0, 0, torch.arange(3)), torch.arange(3)
    assert torch.equal(*(generate(each, draws, (1, 8, 8), y, even_times(2)) for each in (net, wanted)))


REFUSED = {
    "sample {}/shortcut --steps 3": "wanted steps of the lengths 1, 1/2 ... 1/16 that this network has learned",
    "evaluate {}/shortcut --steps 6": "wanted steps of the lengths 1, 1/2 ... 1/16 that this network has learned",
    "convert {}/soflow --out {}/p": "objective: got 'soflow', wanted one whose steps lead from z_t to z_r",
    "convert {}/ict --out {}/p": "objective: got 'ict', wanted one whose steps lead from z_t to z_r",
    "page {}/scm": "objective: got 'scm', wanted one whose steps lead from z_t to z_r",
    "convert {}/shortcut --to official --out {}/p": "objective: got 'shortcut', wanted MeanFlow's for this format",
    "convert {}/shortcut --to zhuyu --out {}/p": "objective: got 'shortcut', wanted MeanFlow's for this format",
    "sample {}/ict --guidance 2": "guidance: got (2.0,), wanted none: this network is told nothing",
}


@pytest.mark.parametrize("line, message", REFUSED.items(), ids=REFUSED)
def test_refused_in_one_line(command, quick, trained, line, message):
    code, _, err = command(*line.replace("{}", str(trained)).split())
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (trained / "p").exists()


def test_a_pipeline_of_shortcuts_draws_what_the_run_does(command, trained, tmp_path):
    pytest.importorskip("diffusers")
    assert command("convert", trained / "shortcut", "--out", tmp_path / "pipeline")[0] == 0
    for path in (trained / "shortcut", tmp_path / "pipeline"):
        out = tmp_path / f"by-{path.name}"
        assert command("sample", path, "--steps", 2, "--count", 3, "--out", out)[0] == 0
    one, other = (np.load(tmp_path / f"by-{name}.npz")["images"] for name in ("shortcut", "pipeline"))
    assert np.array_equal(one, other)
