"""The sweep over guidance: it finds the lowest score, goes on where it stopped, and says what to type next."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from meanflow.apps import sweep
from meanflow.config import DataConfig
from meanflow.evaluation import search
from meanflow.evaluation.classifier import ClassifierJudge, Scores
from meanflow.evaluation.evaluator import Evaluator
from meanflow.evaluation.fid_reference import load_reference
from meanflow.evaluation.protocols import named
from meanflow.interop.weights import load_ema
from meanflow.training.trainer import train
from meanflow.world import World

CPU, FORMER = torch.device("cpu"), sweep.Path(__file__).parents[2] / "data" / "before_rooms"
GRID = ("--omegas", 1, 4, "--intervals", "0-1", "0.3-0.7", "--device", "cpu")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    config = runs.tiny("digits-imf", steps=4, save_every=4, sample_every=4)
    # far from the start, where the guidance shows nothing
    train(replace(config, optim=replace(config.optim, lr=0.05, warmup_steps=0, ema_decay=0.0)), out)
    return out


class Judge:
    """Stands in for the digits' judge: scores what it is told, the lower the nearer to (4, 0.3, 0.7)."""

    asked: list

    def __init__(self, data, seed):
        assert (data.name, seed) == ("digits", 0)

    def score_net(self, net, device, times, guidance):
        self.asked.append(guidance)
        distance = sum((a - b) ** 2 for a, b in zip(guidance, (4, 0.3, 0.7), strict=True))
        return Scores(accuracy=0.5, frechet=1 + distance / len(times), variance_ratio=1.0)


@pytest.fixture
def asked(monkeypatch):
    """The points that are scored."""
    monkeypatch.setattr(sweep, "ClassifierJudge", Judge)
    monkeypatch.setattr(Judge, "asked", [], raising=False)
    return Judge.asked


class Features:
    """Stands in for Extractor: a few numbers an image."""

    device = CPU

    def identity(self):
        return {"inception_sha256": "0" * 64, "inception_is_standard": False}

    def __call__(self, images, resize):
        mixing = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return {"pool3": images.flatten(1).float() / 255 @ mixing}


def rows_of(out: str) -> list[dict]:
    return [json.loads(line) for line in sweep.Path(re.search(r"\S+rows\.jsonl", out)[0]).read_text().splitlines()]


def test_a_sweep_names_the_best_point(command, run_folder, asked):
    code, out, err = command("sweep", run_folder, *GRID, "--steps", 2)
    assert code == 0, err
    assert asked == [(1, 0, 1), (4, 0, 1), (1, 0.3, 0.7), (4, 0.3, 0.7)]
    rows = rows_of(out)
    assert [tuple(row["guidance"]) for row in rows] == asked
    assert rows[-1] == {"guidance": [4, 0.3, 0.7], "accuracy": 0.5, "frechet": 1.0, "variance_ratio": 1.0}
    assert "best of 4 points: omega 4 in [0.3, 0.7]: frechet 1\n" in out
    assert "at the edge of the scales tried: --omegas 3 6 tries" in out
    for verb in ("sample", "evaluate"):
        assert f"python scripts/{verb}.py {run_folder} --steps 2 --guidance 4 0.3 0.7\n" in out
    picture = sweep.Path(re.search(r"\S+heat_map\.png", out)[0])
    assert Image.open(picture).size > (300, 200)
    # the same again scores nothing, more points are scored beside them
    code, again, _ = command("sweep", run_folder, *GRID, "--steps", 2)
    assert code == 0 and again == out and len(asked) == 4
    code, out, _ = command("sweep", run_folder, "--omegas", 6, "--intervals", "0-1", "--steps", 2, "--device", "cpu")
    assert code == 0 and asked[4:] == [(6, 0, 1)] and rows_of(out)[:4] == rows
    assert "best of 5 points: omega 4 in [0.3, 0.7]" in out and "at the edge" not in out


def test_a_killed_sweep_goes_on(command, run_folder, asked, tmp_path, monkeypatch):
    score_net = Judge.score_net

    def killed(self, net, device, times, guidance):
        if guidance == (1, 0.3, 0.7):
            raise KeyboardInterrupt
        return score_net(self, net, device, times, guidance)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "score_net", killed)
        code, _, _ = command("sweep", run_folder, *GRID, "--out", tmp_path / "sweep")
    assert code == 130 and len((tmp_path / "sweep" / "rows.jsonl").read_text().splitlines()) == 2
    asked.clear()
    code, out, err = command("sweep", run_folder, *GRID, "--out", tmp_path / "sweep")
    assert code == 0 and asked == [(1, 0.3, 0.7), (4, 0.3, 0.7)] and len(rows_of(out)) == 4, err
    # another schedule is another sweep
    code, _, err = command("sweep", run_folder, *GRID, "--out", tmp_path / "sweep", "--steps", 2)
    assert code == 2 and "times: got [1.0, 0.5, 0.0], wanted [1.0, 0.0], as in the evaluation that" in err


@pytest.mark.slow
def test_digits_are_scored_by_their_judge(command, run_folder, tmp_path):
    code, out, err = command("sweep", run_folder, *GRID, "--out", tmp_path / "sweep")
    assert code == 0, err
    net, *_ = load_ema(run_folder, CPU)
    judge = ClassifierJudge(DataConfig(name="digits"))
    for row in rows_of(out):
        alone = judge.score_net(net, CPU, (1, 0), tuple(row["guidance"]))
        assert row == {"guidance": row["guidance"], **alone.as_dict()}


def test_latents_are_scored_by_their_fid(command, run_folder, tmp_path, monkeypatch):
    """By the feature network of the tests, and its statistics of a reference of one's own."""
    monkeypatch.setattr(sweep, "Extractor", lambda *args: Features())
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", arr_0=rng.integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    sources = ("--inception", tmp_path / "any.pth", "--data-reference", tmp_path / "real.npz")
    options = (*GRID, *sources, "--protocol", "balanced+own-data", "--count", 20, "--out", tmp_path / "sweep")
    code, out, err = command("sweep", run_folder, *options)
    assert code == 0, err
    net, *_ = load_ema(run_folder, CPU)
    protocol, world = named("balanced+own-data"), World("cpu")
    reference = load_reference("data", tmp_path / "real.npz", Features(), "tensorflow", tmp_path, 64, world)
    for row in rows_of(out):
        judge = Evaluator(
            Features(), reference, lambda z: z, (1, 8, 8), 10, world=world, protocol=protocol,
            guidance=tuple(row["guidance"]),
        )  # fmt: skip
        assert row == {"guidance": row["guidance"], **judge.score(net, 20)}
    assert len({row["fid"] for row in rows_of(out)}) == 4
    # other samples are another sweep
    code, _, err = command("sweep", run_folder, *options, "--count", 30)
    assert code == 2 and "count: got 30, wanted 20, as in the evaluation that" in err


def test_a_grid_with_holes_is_drawn(tmp_path):
    rows = [{"guidance": [omega, 0.4, 0.6], "fid": 3 + (omega - 8) ** 2} for omega in (6.0, 8.0, 9.0)]
    rows.append({"guidance": [8.0, 0.0, 1.0], "fid": 40.0})
    sweep.draw(tmp_path / "map.png", rows)
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 10
    assert search.in_words(search.best(rows)) == "omega 8 in [0.4, 0.6]: fid 3"
    assert search.in_words({"guidance": [2.0], "frechet": 1.5}) == "omega 2: frechet 1.5"


BAD = {
    "--omegas 0.5": "omegas and intervals: got (0.5, 0.0, 1.0), wanted omega of 1 or more",
    "--intervals 0.7-0.3": "omegas and intervals: got (1, 0.7, 0.3), wanted omega of 1 or more, and 0 <= start",
    "--intervals 0.4": "intervals: got '0.4', wanted START-END, for instance 0.4-0.65",
    "--steps 0": "steps: got 0",
    "--protocol fast": "protocols: got 'fast', wanted names among official",
    "--count 1": "count: got 1, wanted at least 2 samples",
    "--inception /nowhere.pth": "inception: got",
}


@pytest.mark.parametrize("line, message", BAD.items(), ids=BAD)
def test_bad_input(command, run_folder, line, message):
    code, _, err = command("sweep", run_folder, *line.split(), "--device", "cpu")
    assert code == 2 and message in err and err.startswith("sweep.py: error: ") and err.count("\n") == 1


def test_a_network_that_is_told_nothing(command):
    code, _, err = command("sweep", FORMER / "run", "--device", "cpu")
    assert code == 2 and "checkpoint: got 'none: this network is told nothing', wanted a network that is told" in err


def test_help_teaches(command):
    code, out, _ = command("sweep", "--help")
    assert code == 0 and "python scripts/sweep.py runs/digits-imf" in out and "1 is no guidance" in out


def test_samples_are_told_what_their_run_was(command, tmp_path):
    config = runs.tiny("digits-imf", steps=1, save_every=1, sample_every=1)
    train(replace(config, evaluation=replace(config.evaluation, guidance=(2.0, 0.1, 0.6))), tmp_path)
    for given, name in (((), "2-0.1-0.6"), (("--guidance", 3, 0, 1), "3-0-1")):
        code, out, err = command("sample", tmp_path, "--count", 2, "--device", "cpu", *given)
        assert code == 0 and f"guidance{name}_count2" in out, err
