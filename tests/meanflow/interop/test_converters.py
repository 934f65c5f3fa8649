"""Conversions, each by equal outputs, there and back, and what they refuse."""

import json
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import oracle
import pytest
import runs
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")
from conversions import SiT, assert_equal, run_convert

from meanflow.config import ModelConfig
from meanflow.errors import UserError
from meanflow.interop import convert
from meanflow.interop.official_weights import from_official, to_official
from meanflow.interop.weights import load_checkpoint, load_ema
from meanflow.method.sampling import sample
from meanflow.model.build import build_net
from meanflow.storage.checkpoint import load_weights
from meanflow.storage.flax_files import read_flax, read_msgpack, write_flax, write_msgpack
from meanflow.training.trainer import train

ROOT = Path(__file__).parents[3]
FLAX = ROOT / "tests" / "data" / "flax"
SCHEDULES = sorted({key.split("/")[0] for key in oracle.load("sampling") if key.endswith("f32/samples")})


# --- the official code's checkpoints ---


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The oracle's parameters as a checkpoint of the official code; the file, its arrays and its heads."""
    data = oracle.load("sampling")
    source = oracle.load(str(data["params_from"]).removesuffix(".npz"))
    params = {f"net/{path}": x for path, x in oracle.group(source, "params/").items()}
    file = tmp_path_factory.mktemp("official") / "checkpoint_300240"
    write_flax(file, params, {path: np.zeros_like(x) for path, x in params.items()}, 300240)
    return file, params, oracle.settings(source, "config")


def read_official(official):
    file, _, shape = official
    return convert.load(file, "official", num_heads=shape["num_heads"], input_size=shape["input_size"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_official_converter_gives_the_official_samples(official, tmp_path, schedule):
    from meanflow.interop.pipeline import MeanFlowPipeline

    data = oracle.load("sampling")
    if f"{schedule}/f64/samples" not in data:
        pytest.skip("the schedule's samples are not stored")
    wanted = oracle.tensor(data[f"{schedule}/f64/samples"]).double()
    made = convert.make_pipeline(read_official(official))
    made.save_pretrained(tmp_path)
    for pipeline in (made, MeanFlowPipeline.from_pretrained(tmp_path)):
        pipeline.set_progress_bar_config(disable=True)
        noise, labels = oracle.tensor(data["noise"], torch.float32), oracle.tensor(data["labels"])
        times = data[f"{schedule}/t_steps"].tolist()
        got = pipeline(labels, timesteps=times, latents=noise, output_type="latent").images
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_official_converter_there_and_back(official, tmp_path):
    file, params, shape = official
    heads = ("--num-heads", shape["num_heads"], "--input-size", shape["input_size"])
    code, out, err = run_convert(file, "--out", tmp_path / "pipeline", *heads)
    assert code == 0 and "step 300240 from the official code's checkpoint_300240" in out, err
    code, _, err = run_convert(tmp_path / "pipeline", "--to", "official", "--out", tmp_path / "checkpoint_300240")
    assert code == 0, err
    again, step, _ = read_flax(tmp_path)
    assert step == 300240
    assert_equal(again, params)
    # the weights to start from, too
    code, _, err = run_convert(file, "--to", "weights", "--out", tmp_path / "w.safetensors", *heads)
    assert code == 0, err
    net, config, _, step = load_ema(tmp_path / "w.safetensors", torch.device("cpu"))
    assert_equal(to_official(net.state_dict()), {path.removeprefix("net/"): x for path, x in params.items()})
    assert step == 300240 and config.model.num_heads == shape["num_heads"]


def test_official_converter_reads_what_flax_wrote():
    made = runpy.run_path(str(FLAX / "make_flax.py"))
    for part, seed in (("model", 0), ("ema", 1)):
        arrays, step, path = read_flax(FLAX, part)
        assert step == 7 and path.name == "checkpoint_7"
        assert_equal(arrays, {f"net/{path}": x for path, x in made["arrays"](seed).items()})
    example = read_msgpack(FLAX / "chunked")
    assert example["large"].tolist() == np.arange(60).reshape(3, 20).tolist()
    assert example["small"] == 3 and example["small"].dtype == np.float64 and example["deep"] == {"n": 5}


def test_official_converter_writes_what_flax_would(tmp_path, monkeypatch):
    write_msgpack(tmp_path / "same", read_msgpack(FLAX / "checkpoint_7"))
    assert (tmp_path / "same").read_bytes() == (FLAX / "checkpoint_7").read_bytes()
    monkeypatch.setattr("meanflow.storage.flax_files.CHUNK_BYTES", 64)
    write_msgpack(tmp_path / "chunked", read_msgpack(FLAX / "chunked"))
    assert (tmp_path / "chunked").read_bytes() == (FLAX / "chunked").read_bytes()
    # a train state of our own has flax's fields, and an optimizer that has not stepped
    (ema, step, _), (model, _, _) = read_flax(FLAX, "ema"), read_flax(FLAX, "model")
    write_flax(tmp_path / "checkpoint_7", ema, model, step)
    ours, theirs = read_msgpack(tmp_path / "checkpoint_7"), read_msgpack(FLAX / "checkpoint_7")

    def fields(tree, path=""):
        if not isinstance(tree, dict) or not tree:
            return {path: (getattr(tree, "shape", ()), getattr(tree, "dtype", int))}
        return {k: x for key, value in tree.items() for k, x in fields(value, f"{path}/{key}").items()}

    assert fields(ours) == fields(theirs)


def test_official_converter_reads_orbax():
    pytest.importorskip("tensorstore", reason="tensorstore, which reads Orbax, is not installed")
    for part in ("model", "ema"):
        arrays, step, _ = read_flax(FLAX / "orbax", part)
        assert step == 7
        assert_equal(arrays, read_flax(FLAX, part)[0])


def test_official_converter_says_what_orbax_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(UserError, match="an Orbax folder, wanted the package tensorstore.*; pip install tensorstore$"):
        read_flax(FLAX / "orbax")


def test_official_converter_refuses_what_is_damaged(tmp_path):
    whole = (FLAX / "checkpoint_7").read_bytes()
    cases = {
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:-9],
        "empty": b"",
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        # an array of another kind than flax has
        "extension": whole.replace(b"\xa4bias\xc7-\x01", b"\xa4bias\xc7-\x05"),
        "no state": b"\x81\xa1a\x01",
        "half a state": b"\x81\xa4step\x01",
    }
    assert cases["extension"] != whole
    for name, content in cases.items():
        path = tmp_path / "checkpoint_1"
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_flax(path)
        assert str(error.value).startswith("checkpoint: got") and "\n" not in str(error.value), name
    for path in (tmp_path / "none", tmp_path / "checkpoint_2"):
        with pytest.raises(UserError, match="checkpoint: got"):
            read_flax(path)
    with pytest.raises(UserError, match="a folder without checkpoints"):
        read_flax(FLAX.parent)


# --- our own ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(runs.tiny(), out)
    return out


@pytest.mark.parametrize("part", ["ema", "model"])
def test_run_converter_to_a_pipeline_and_back(run, tmp_path, part):
    from meanflow.interop.pipeline import MeanFlowPipeline

    code, out, err = run_convert(run, "--out", tmp_path / "p", "--weights", part)
    assert code == 0 and "of step 10 from a run of this project" in out, err
    weights, config, _, step = load_checkpoint(run, part)
    pipeline = MeanFlowPipeline.from_pretrained(tmp_path / "p")
    pipeline.set_progress_bar_config(disable=True)
    assert_equal(pipeline.transformer.state_dict(), weights)
    assert pipeline.get_label_ids(["7"]) == [7] and pipeline.vae is None
    net, noise, labels = build_net(ModelConfig(**config["model"])), torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 9])
    net.load_state_dict(weights)
    got = pipeline(labels, latents=noise, output_type="latent").images
    torch.testing.assert_close(got, sample(net, noise, labels), rtol=0, atol=1e-6)
    code, _, err = run_convert(tmp_path / "p", "--to", "weights", "--out", tmp_path / "w.safetensors")
    assert code == 0, err
    again, its_config, its_step = load_weights(tmp_path / "w.safetensors")
    assert_equal(again, weights)
    assert its_config == config and its_step == step
    assert f"step {step}, weights: {part}" in (tmp_path / "p" / "README.md").read_text()


def test_converter_to_a_pipeline_with_vae_names_and_scores(tmp_path):
    from diffusers import AutoencoderKL

    from meanflow.interop.pipeline import MeanFlowPipeline

    torch.save(SiT().state_dict(), tmp_path / "sit.pt")
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    for channels in (4, 3):
        AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=channels, **blocks).save_pretrained(
            tmp_path / f"vae{channels}"
        )
    (tmp_path / "names.txt").write_text("tench\ngoldfish\ngreat white shark\ntiger shark\nhammerhead\n")
    score = {"value": 12.25, "interval": [12, 12.5]}
    report = {
        "results": [{"protocol": "official", "times": [1, 0], "count": 50000, "fid": score, "checkpoint": "/home"}]
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    options = [
        "--format",
        "sit",
        "--num-heads",
        4,
        "--names",
        tmp_path / "names.txt",
        "--scores",
        tmp_path / "report.json",
    ]
    code, out, err = run_convert(tmp_path / "sit.pt", "--out", tmp_path / "p", "--vae", tmp_path / "vae4", *options)
    assert code == 0 and "a start, not yet a one-step model" in out, err
    pipeline = MeanFlowPipeline.from_pretrained(tmp_path / "p")
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert pipeline("goldfish", generator=torch.Generator().manual_seed(0)).images[0].mode == "RGB"
    assert "| official | 1 0 | 50000 | 12.25 |" in (tmp_path / "p" / "README.md").read_text()
    assert "/home" not in (tmp_path / "p" / "README.md").read_text()
    code, _, err = run_convert(tmp_path / "sit.pt", "--out", tmp_path / "q", "--vae", tmp_path / "vae3", *options)
    assert code == 2 and "vae: got '3 channels', wanted 4 channels" in err
    code, _, err = run_convert(tmp_path / "sit.pt", "--out", tmp_path / "q", "--vae", tmp_path / "nowhere", *options)
    assert code == 2 and "vae: got" in err and err.count("\n") == 1


def test_converter_leaves_no_half_a_pipeline(run, tmp_path, monkeypatch):
    from meanflow.interop.scheduler import MeanFlowScheduler

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MeanFlowScheduler, "save_pretrained", full)
    code, _, err = run_convert(run, "--out", tmp_path / "p")
    assert code == 2 and "which cannot be written" in err and "No space left" in err
    assert not (tmp_path / "p").exists()


def test_pipeline_converter_refuses_a_truncated_pipeline(run, tmp_path):
    code, _, err = run_convert(run, "--out", tmp_path / "p")
    assert code == 0, err
    file = next((tmp_path / "p").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = run_convert(tmp_path / "p", "--to", "weights", "--out", tmp_path / "w.safetensors")
    assert code == 2 and err.splitlines()[-1].startswith("convert.py: error: source: got"), err
    assert "cannot be loaded" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["B/4", "M/2", "XL/2"])
def test_converter_tells_the_official_sizes(name):
    with torch.device("meta"):
        state = build_net(ModelConfig.official(name)).state_dict()
    assert convert.infer_model(state) == ModelConfig.official(name)


def test_converter_names_imagenets_classes():
    names = convert.read_names("imagenet", 1000)
    assert len(names) == 1000 and names[0] == "tench, Tinca tinca" and names[999].startswith("toilet tissue")
    assert names[207] == "golden retriever" and names[281].startswith("tabby")
    with pytest.raises(UserError, match="names: got '1000 names', wanted names of the classes 0 to 9"):
        convert.read_names("imagenet", 10)


BAD = {
    "{run}": "out: got None",
    "{tmp}/nothing --out {tmp}/a": "source: got",
    "{run} --out {run}": "out: got",
    "{run} --out {tmp}/a --names {tmp}/none.txt": "names: got",
    "{run} --out {tmp}/a --names {tmp}/long.txt": "names: got '11 names', wanted names of the classes 0 to 9",
    "{run} --out {tmp}/a --scores {tmp}/long.txt": "scores: got",
    "{run} --out {tmp}/a --format official": "checkpoint: got",
    "{run} --out {tmp}/a --format pipeline": "source: got",
    "{run} --out {tmp}/a --to png": "'png'",
}


@pytest.mark.parametrize("line, message", BAD.items(), ids=BAD)
def test_converter_bad_input(run, tmp_path, line, message):
    (tmp_path / "long.txt").write_text("name\n" * 11)
    code, _, err = run_convert(*line.format(run=run, tmp=tmp_path).split())
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_converter_of_names_is_its_own_inverse():
    params = oracle.group(oracle.load("dit_p4"), "params/")
    assert_equal(to_official(from_official(params)), params)
    shape = oracle.settings(oracle.load("dit_p4"), "config")
    assert asdict(convert.infer_model(from_official(params), num_heads=4, input_size=16)).items() >= shape.items()
