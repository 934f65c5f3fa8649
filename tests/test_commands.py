"""The commands as their users meet them: results, messages, exit codes."""

import json
from dataclasses import replace
from pathlib import Path

import caches
import numpy as np
import pytest
import runs
import torch
from PIL import Image

from meanflow.apps.ablate import AXES
from meanflow.config import EvaluationConfig
from meanflow.data.cache import _checksum, _write_json, read_manifest
from meanflow.data.images import CAPTION
from meanflow.draws import Purpose
from meanflow.evaluation.classifier import Scores
from meanflow.interop.formats import known_names
from meanflow.method.guidance import ELSEWHERE
from meanflow.presets import PRESETS
from meanflow.training.trainer import train

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(runs.tiny(), out)
    return out


BAD_TRAINING = {
    "digitz": "preset: got 'digitz', wanted a preset, of which 'digits' and 'digits-scm' are nearest",
    "digits --train.stepss 3": "Unrecognized options: --train.stepss, 3; wanted --train.steps",
    "digits --train.steps many": "--train.steps",
    "digits --train.steps -5": "train.steps: got -5, wanted a positive whole number",
    "digits --data.name faces": "'faces'",
    "digits --train.batch 3": "train.batch: got 3, wanted one that a share of r = t of 0.5 divides",
    "digits --train.batch 5000": "train.batch: got 5000, wanted at most the 1797 samples",
    "digits --objective.kappa -0.5": "objective.kappa: got -0.5, wanted a number in [0, 1)",
    "digits --model.input-size 16": "data: got (1, 8, 8), wanted samples of the model's shape (1, 16, 16)",
    "digits --model.num-classes 5": "model.num_classes: got 5, wanted the data's 10",
    "imagenet-b4": "data.path: got '', wanted a folder of latents",
    "imagenet-b4 --data.path /nowhere": "cache: got /nowhere, which has no manifest.json, wanted a folder of latents",
}


@pytest.mark.parametrize("line, message", BAD_TRAINING.items(), ids=BAD_TRAINING)
def test_bad_input_to_train(command, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("train", *line.split())
    assert code == 2
    assert message in err and err.startswith("train.py: error: ") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(command, tmp_path):
    code, _, err = command("train", "digits", "--train.device", "cuda", "--out", tmp_path)
    assert code == 2 and "torch sees no GPU" in err


def test_labels_out_of_range(command, tmp_path):
    cache = caches.cache_of(tmp_path, np.zeros((8, 4, 4, 4)), np.ones((8, 4, 4, 4)), np.arange(8) * 2)
    args = ["--data.path", cache, "--model.input-size", 4, "--train.batch", 8, "--out", tmp_path / "run"]
    code, _, err = command("train", "imagenet-b4", *args, "--model.num-classes", 10)
    assert code == 2 and "labels: got 10, wanted labels from 0 to 9" in err


def test_training_on_latents(command, tmp_path):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(64, 4, 8, 8)), np.full((64, 4, 8, 8), 0.1)
    cache = caches.cache_of(tmp_path, mean, std, rng.integers(0, 5, 64))
    args = f"--data.path {cache} --out {tmp_path}/run --model.input-size 8 --model.num-classes 5 --model.depth 1 "
    args += "--model.hidden-size 32 --model.num-heads 2 --train.steps 4 --train.batch 8 --train.log-every 2 "
    args += f"--objective.omega 0.2 --objective.kappa 0.5 --data.vae {tmp_path}/no-vae --train.no-compile"
    code, out, err = command("train", "imagenet-b4", *args.split())
    assert (code, len(runs.curve(tmp_path / "run"))) == (0, 2), err
    assert "no pictures of samples: data.vae: got" in out  # said, and trained on


def test_preparing_data(command, tmp_path):
    caches.cache_of(tmp_path, np.zeros((9, 4, 8, 8)), np.ones((9, 4, 8, 8)), np.arange(9))
    args = ["import", tmp_path, "--out", tmp_path / "new", "--layout", "arrays", "--shard-rows", 4]
    code, out, _ = command("prepare_data", *args)
    assert code == 0 and "new: 9 latents 4x8x8 fp16 in 3 shards" in out
    assert command("prepare_data", "verify", tmp_path / "new")[:2] == (0, f"{tmp_path}/new: all 3 shards are good\n")
    shard = tmp_path / "new" / "shard_00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, out, _ = command("prepare_data", "verify", tmp_path / "new")
    assert code == 2 and "shard 1: shard_00001.npy does not match its SHA-256" in out and "with --repair" in out
    assert command("prepare_data", *args, "--repair")[0] == 0
    assert command("prepare_data", "verify", tmp_path / "new")[0] == 0


@pytest.mark.parametrize(
    "args, message",
    {
        "verify /nowhere": "cache: got /nowhere, which has no manifest.json",
        "import /nowhere --layout repa --out x": "source: got '/nowhere', wanted a folder or file that exists",
        "import /nowhere --out x": "--layout",
        "encode /nowhere --out x": "source: got /nowhere, which is not there",
        "encode /nowhere --out x --batch 0": "batch: got 0, wanted a positive whole number",
        "encode /nowhere": "--out",
        "make /nowhere": "verb: got 'make', wanted one of encode import verify",
    }.items(),
)
def test_bad_input_to_prepare_data(command, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("prepare_data", *args.split())
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_and_dry_run(command):
    code, out, _ = command("train", "--help")
    assert code == 0 and all(name in out for name in PRESETS)
    code, out, _ = command("train", "imagenet-xl2", "--help")
    assert code == 0 and "Learning rate" in out and "{t,h | t,r | t,r,h | h | t | tau,level}" in out
    common = out.partition("Common: ")[2].partition("\n\n")[0].split()
    listed = out.partition("options")[2].replace(",", " ")
    assert len(common) > 5 and all(f"{option} " in listed for option in common)
    code, out, _ = command("train", "imagenet-xl2", "--objective.omega", "0.5", "--dry-run")
    config = json.loads(out)
    assert code == 0 and config["objective"]["omega"] == 0.5 and config["objective"]["kappa"] == 0.92


def test_sample(command, run_folder, tmp_path):
    code, out, _ = command("sample", run_folder, "--labels", 3, 5, "--count", 7, "--steps", 2, "--out", tmp_path / "a")
    assert code == 0 and "2 evaluation(s)" in out
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (7, 8, 8, 1) and arrays["images"].dtype == np.uint8
        assert arrays["labels"].tolist() == [3, 5, 3, 5, 3, 5, 3]
        images = arrays["images"]
    assert Image.open(tmp_path / "a.png").size == ((10 * 9 + 1) * 4, (1 * 9 + 1) * 4 + CAPTION)
    command("sample", run_folder, "--labels", 3, 5, "--count", 5, "--batch", 2, "--steps", 2, "--out", tmp_path / "b")
    with np.load(tmp_path / "b.npz") as arrays:  # a sample depends on its seed and place alone
        assert np.abs(arrays["images"].astype(int) - images[:5]).max() <= 1
    code, _, err = command("sample", run_folder, "--out", tmp_path / "a")
    assert code == 2 and "wanted a file that does not exist yet" in err and "or take --overwrite" in err
    assert command("sample", run_folder, "--count", 4, "--out", tmp_path / "a", "--overwrite")[0] == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["images"]) == 4


def test_samples_of_other_options_have_other_names(command, run_folder):
    options = ["", "--labels 3", "--labels 3 5", "--times 1 0.5 0", "--times 1 0.25 0", "--seed 1", "--steps 2"]
    for line in options:
        assert command("sample", run_folder, "--count", 2, *line.split())[0] == 0, line
    names = {path.stem for path in (run_folder / "generated").glob("*.png")}
    assert len(names) == len(options) and "step10_times1-0.25-0_seed0_count2" in names


def test_names_of_classes_go_from_the_cache_to_the_pipeline(command, tmp_path):
    names = ["tench", "great white shark, white shark", "hen"]
    (tmp_path / "names.json").write_text(json.dumps(dict(enumerate("abc"))))
    cache = caches.cache_of(tmp_path, np.zeros((8, 1, 8, 8)), np.ones((8, 1, 8, 8)), np.arange(8) % 3)
    manifest = read_manifest(cache) | {"classes": names}  # as an image set's
    _write_json(cache / "manifest.json", manifest | {"checksum": _checksum(manifest)})
    args = f"--data.path {cache} --out {tmp_path}/run --model.input-size 8 --model.num-classes 3 --model.depth 1 "
    args += "--model.in-channels 1 --model.hidden-size 16 --model.num-heads 2 --train.steps 1 --train.batch 8 "
    code, _, err = command("train", "imagenet-b4", *args.split(), "--train.no-compile", "--data.vae", tmp_path)
    assert code == 0, err
    assert command("export", tmp_path / "run", "--out", tmp_path / "weights.safetensors")[0] == 0
    for source in ("run", "weights.safetensors"):
        pipeline = tmp_path / f"pipeline of {source}"
        assert command("convert", tmp_path / source, "--out", pipeline)[0] == 0
        found = json.loads((pipeline / "model_index.json").read_text())["id2label"]
        assert [found[str(i)] for i in range(3)] == names
        assert known_names(tmp_path / source) == known_names(pipeline) == found
    # names of one's own go first
    assert command("convert", tmp_path / "run", "--out", tmp_path / "own", "--names", tmp_path / "names.json")[0] == 0
    assert known_names(tmp_path / "own") == {"0": "a", "1": "b", "2": "c"}


@pytest.mark.parametrize(
    "args, message",
    {
        "--labels 3 10": "labels: got 10, wanted classes from 0 to 9",
        "--steps 0": "steps: got 0",
        "--times 0 1": "times: got (0.0, 1.0), wanted at least two falling times",
        "--count 0": "count: got 0",
        "--guidance 2": "guidance: got (2.0,), wanted none: this network is told nothing",
    }.items(),
)
def test_bad_input_to_sample(command, run_folder, args, message):
    code, _, err = command("sample", run_folder, *args.split())
    assert code == 2 and message in err and err.count("\n") == 1


def test_nothing_to_sample_from(command, tmp_path):
    for script in ("sample", "evaluate"):
        code, _, err = command(script, tmp_path)
        assert code == 2 and "where there is none" in err and err.count("\n") == 1
        code, _, err = command(script, tmp_path / "missing")
        assert code == 2 and "where there is none" in err
        code, _, err = command(script, tmp_path / "missing.safetensors")
        assert code == 2 and "cannot be read" in err


def test_export(command, run_folder, tmp_path):
    out = tmp_path / "weights.safetensors"
    code, said, _ = command("export", run_folder, "--out", out)
    assert code == 0 and "step 10" in said
    code, _, err = command("export", run_folder, "--out", out)
    assert code == 2 and "wanted a file that does not exist yet" in err
    for source in (run_folder, out):
        assert command("sample", source, "--count", 4, "--out", tmp_path / source.name)[0] == 0
    a, b = (np.load(tmp_path / f"{source.name}.npz")["images"] for source in (run_folder, out))
    assert np.array_equal(a, b)
    # half a file, and one of somebody else
    out.write_bytes(out.read_bytes()[:-9])
    code, _, err = command("sample", out)
    assert code == 2 and "cannot be read" in err and err.count("\n") == 1


@pytest.fixture
def quick_judge(monkeypatch, tmp_path):
    """A judge that learns for one epoch: what it says is not looked at."""
    monkeypatch.setattr("meanflow.evaluation.classifier.CLASSIFIER_EPOCHS", {"digits": 1})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_evaluate(command, quick_judge, run_folder):
    code, out, _ = command("evaluate", run_folder, "--json")
    result = json.loads(out)
    assert code == 0 and result["step"] == 10 and result["evaluations"] == 1
    assert {"accuracy", "frechet", "variance_ratio", "frechet_floor", "classifier_accuracy_real"} <= result.keys()


def test_evaluate_digits_at_several_steps(command, run_folder, monkeypatch):
    class Judge:  # the real one trains a classifier
        accuracy_real = 0.98

        def __init__(self, data, seed):
            self.floor = lambda: 1.1
            self.score_net = lambda net, device, times, guidance: Scores(len(times) / 10, 2.0, 3.0)

    monkeypatch.setattr("meanflow.apps.evaluate.ClassifierJudge", Judge)
    code, out, _ = command("evaluate", run_folder, "--json", "--steps", 1, 2)
    assert code == 0 and [(row["evaluations"], row["accuracy"]) for row in json.loads(out)] == [(1, 0.2), (2, 0.3)]
    code, out, _ = command("evaluate", run_folder, "--times", 1, 0.25, 0)
    assert code == 0 and "accuracy                   0.3" in out.splitlines()


def test_a_network_is_told_its_guidance(command, tmp_path, monkeypatch):
    told, run = [], tmp_path / "run"

    def remember(net, draws, shape, y, times=(1.0, 0.0), guidance=()):
        told.append(guidance)
        return draws.normal(Purpose.NOISE, shape)

    for module in ("apps.sample", "evaluation.classifier", "training.trainer"):
        monkeypatch.setattr(f"meanflow.{module}.generate", remember)
    monkeypatch.setattr("meanflow.evaluation.classifier.CLASSIFIER_EPOCHS", {"digits": 0})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny, given, best = runs.tiny("digits-imf", steps=2, sample_every=2), (3.0, 0.2, 0.5), ELSEWHERE
    assert train(replace(tiny, evaluation=EvaluationConfig(every=2, guidance=given)), run) == 0
    for script, options in {"sample": ("--count", 2), "evaluate": ("--json",)}.items():
        assert command(script, run, *options)[0] == command(script, run, *options, "--guidance", *best)[0] == 0
        code, _, err = command(script, run, "--guidance", 3)
        assert code == 2 and "guidance: got (3.0,), wanted omega, start and end" in err and err.count("\n") == 1
    # two of the training, then two of each command, which take the training's unless they are told otherwise
    assert told == [given, given, given, best, given, best]
    names = {path.stem for path in (run / "generated").glob("*.png")}
    assert "step2_nfe1_seed0_guidance3-0.2-0.5_count2" in names and len(names) == 2
    code, _, err = command("convert", run, "--to", "zhuyu", "--out", tmp_path / "zhuyu.pt")
    assert code == 2 and "model: got {'network': 'imf', " in err and err.count("\n") == 1


class FewFeatures:
    """Stands in for the feature networks, which take a fifth of a second an image."""

    def __init__(self, inception, device, dinov2):
        self.device = device

    def identity(self):
        return {"inception_sha256": "0" * 64, "inception_is_standard": False, "dinov2_sha256": None}

    def __call__(self, images, resize):
        x = images.float().flatten(1)[:, :5] / 255
        return {"pool3": x, "spatial": x[:, :2]}

    def probabilities(self, pool3):
        return pool3.softmax(1)


def test_evaluate_by_protocols(command, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("meanflow.apps.evaluate.Extractor", FewFeatures)
    reference = tmp_path / "adm.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8))
    args = [run_folder, "--inception", "any", "--reference", reference, "--count", 30, "--batch", 8, "--steps", 1, 2]
    code, out, err = command("evaluate", *args, "--protocols", "official", "balanced+round")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[1].startswith("balanced+round (adm, balanced, round, tensorflow), 1 step(s), 30 images: fid ")
    report = Path(lines[-1])
    assert report == run_folder / "evaluation" / "step10_seed0_fp32" / "report.json"
    written = json.loads(report.read_text())
    assert [(row["protocol"], row["times"]) for row in written["results"]][2:] == [
        ("official", [1, 0.5, 0]),
        ("balanced+round", [1, 0.5, 0]),
    ]
    assert written["vae"] is None and len(written["weights_sha256"]) == 64 and written["seed"] == 0
    code, out, _ = command("evaluate", *args, "--json")  # from the features that are there
    assert json.loads(out)["results"] == [row for row in written["results"] if row["protocol"] == "official"]
    code, _, err = command("evaluate", *args, "--batch", 7)
    assert code == 2 and "batch: got 7, wanted 8, as in the evaluation" in err


@pytest.mark.parametrize(
    "args, message",
    {
        "--inception missing.pth": "inception: got missing.pth, wanted the weights of the FID's network",
        "--protocols offical": "protocols: got 'offical', wanted names among official",
        "--count 19": "count: got 19, wanted at least 20 samples",
        "--batch 0": "batch: got 0",
        "--steps 0": "steps: got 0",
    }.items(),
)
def test_bad_input_to_evaluate(command, run_folder, args, message):
    code, _, err = command("evaluate", run_folder, *args.split())
    assert code == 2 and message in err and err.count("\n") == 1


def test_quickstart(command, quick_judge, tmp_path):
    out = tmp_path / "quickstart"
    args = ["--out", out, "--train.steps", 4, "--train.batch", 8, "--model.depth", 1, "--train.device", "cpu"]
    code, text, _ = command("quickstart", *args)
    assert code == 0 and "Fréchet distance" in text
    report = json.loads((out / "report.json").read_text())
    keys = "accuracy frechet frechet_flow_matching frechet_floor variance_ratio classifier_accuracy_real"
    assert {*keys.split(), "train_seconds", "images_per_second"} <= report.keys()
    assert "Fréchet" in (out / "report.md").read_text() and Image.open(out / "samples.png").size[0] > 1000
    written = (out / "report.json").stat().st_mtime_ns
    again = command("quickstart", *args)[1]
    assert again.startswith("# One-step") and again.rpartition("(")[0] in text  # the report alone
    assert (out / "report.json").stat().st_mtime_ns == written
    code, text, _ = command("quickstart", *args, "--train.seed", 1)
    assert code == 0 and len(list(tmp_path.glob("quickstart-*"))) == 1
    assert (out / "report.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["quickstart", "train"])
def test_folder_that_cannot_be_made(command, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    args = ["digits"] * (name == "train") + ["--out", tmp_path / "file" / "run"]
    code, _, err = command(name, *args)
    assert code == 2 and err.startswith(f"{name}.py: error: ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_ablation(command, quick_judge, tmp_path, monkeypatch):
    papers = {"v01": 61.06, "v00": 268.06, "v10": 329.22, "v11": 137.96}
    rows = AXES["tangent"].rows
    assert {row: fid for row, (_, fid) in rows.items()} == papers
    # two rows, of a tiny network
    monkeypatch.setitem(AXES, "tangent", replace(AXES["tangent"], rows={row: rows[row] for row in ("v01", "v11")}))
    monkeypatch.setattr("meanflow.apps.ablate.preset", lambda name: runs.tiny())
    args = ["tangent", "--steps", 3, "--seeds", 0, 1, "--out", tmp_path]
    code, text, err = command("ablate", *args)
    assert code == 0, err
    for row in ("v01", "v11"):
        assert any(row in line and str(papers[row]) in line for line in text.splitlines())
    assert Image.open(tmp_path / "tangent" / "picture.png").size[0] > 500
    assert command("ablate", *args)[1].rpartition("Digits")[2] == text.rpartition("Digits")[2]
    code, _, err = command("ablate", "tangents")
    assert code == 2 and "axis: got 'tangents', wanted one of share tangent" in err
