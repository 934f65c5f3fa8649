"""Conversions of improved MeanFlow: the official files, by equal outputs, there and back, and what starts from them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle_imf as oracle
import pytest
import runs
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")
from conversions import assert_equal, run_convert

from meanflow.config import ModelConfig
from meanflow.interop.imf_weights import infer_improved, to_official
from meanflow.interop.weights import load_checkpoint, load_ema
from meanflow.storage.flax_files import read_flax, write_flax
from meanflow.training.trainer import Trainer, train

NAME = "imf_net_oddmlp"
CPU, FORMER = torch.device("cpu"), Path(__file__).parents[2] / "data" / "before_rooms"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The oracle's parameters as an official checkpoint, converted to a file to start from; that and the parameters."""
    folder = tmp_path_factory.mktemp("imf")
    data = oracle.load(NAME)
    params = {f"net/{path}": x for path, x in oracle.group(data, "params/").items()}
    file, size = folder / "checkpoint_800640", oracle.settings(data, "config")["input_size"]
    write_flax(file, params, {path: np.zeros_like(x) for path, x in params.items()}, 800640)
    code, out, err = run_convert(file, "--to", "weights", "--out", folder / "weights.safetensors", "--input-size", size)
    assert code == 0 and "step 800640 from improved MeanFlow's official checkpoint_800640" in out, err
    return folder / "weights.safetensors", params


def outputs(net, head="u"):
    data = oracle.load(NAME)
    z, t, r, w, a, b = (oracle.tensor(data[key], torch.float32) for key in ("z", "t", "r", "w", "a", "b"))
    return net(z, r, t, oracle.tensor(data["y"]), w, a, b, head=head)


def test_an_official_checkpoint_and_back(converted, tmp_path):
    weights, params = converted
    net, config, _, step = load_ema(weights, CPU)
    for key, got in zip("uv", outputs(net, "uv"), strict=True):
        oracle.assert_close(got, oracle.load(NAME)[f"f32/{key}"], "f32", "u", key)
    assert step == 800640 and config.objective.guidance_input == "interval" and len(config.data.latent_mean) == 4
    shape = oracle.options(oracle.settings(oracle.load(NAME), "config"))
    mlp_hidden = shape.pop("mlp_hidden")
    assert config.model.mlp_hidden == mlp_hidden and mlp_hidden % 8 and vars(config.model).items() >= shape.items()
    code, _, err = run_convert(weights, "--to", "official", "--out", tmp_path / "checkpoint_800640")
    assert code == 0, err
    for part in ("ema", "model"):
        again, step, _ = read_flax(tmp_path, part)
        assert step == 800640
        assert_equal(again, params)


def test_an_official_file_to_sample_from_and_back(converted, tmp_path):
    weights, params = converted
    code, _, err = run_convert(weights, "--to", "imf", "--out", tmp_path / "MiT.pth")
    assert code == 0, err
    state = torch.load(tmp_path / "MiT.pth", weights_only=True)
    assert all(name.startswith("net.") and "v_heads" not in name for name in state)
    width = oracle.options(oracle.settings(oracle.load(NAME), "config"))["mlp_hidden"]
    assert len(state["net.u_heads.0.mlp.w3._flax_linear.weight"]) == width
    assert state["net.v_final_layer.norm.weight"].equal(torch.from_numpy(params["net/v_final_layer/norm/kernel"]))
    # back, from what holds it too: v begins as u, which it is at r = t
    torch.save({"ema": state, "steps": 7}, tmp_path / "held.pth")
    options = ("--format", "imf", "--to", "weights", "--input-size", 8)
    code, out, err = run_convert(tmp_path / "held.pth", *options, "--out", tmp_path / "w.safetensors")
    assert code == 0 and "It holds no head for v, which begins as a copy of u's." in out, err
    first, second = load_ema(weights, CPU)[0], load_ema(tmp_path / "w.safetensors", CPU)[0]
    assert torch.equal(outputs(first), outputs(second))
    u, v = outputs(second, "uv")
    assert torch.equal(u, v) and not torch.equal(v, outputs(first, "v"))


def test_training_starts_from_a_converted_file(tmp_path):
    """A run, as an official file, as weights: a new run begins with them."""
    config = runs.tiny("digits-imf", steps=2, sample_every=2, save_every=2)
    assert train(config, tmp_path / "run") == 0
    for source, *options in (
        ("run", "--to", "imf", "--out", "run.pth"),
        ("run.pth", "--format", "imf", "--to", "weights", "--input-size", "8", "--out", "w.safetensors"),
    ):
        code, _, err = run_convert(tmp_path / source, *options[:-1], tmp_path / options[-1])
        assert code == 0, err
    tuned = replace(config, train=replace(config.train, init=str(tmp_path / "w.safetensors")))
    start = load_checkpoint(tmp_path / "w.safetensors")[0]
    trainer = Trainer(tuned, tmp_path / "tuned")
    assert_equal({k: x.clone() for k, x in trainer.net.state_dict().items()}, start)
    run = load_checkpoint(tmp_path / "run")[0]
    assert_equal(*({k: x for k, x in each.items() if not k.startswith("v_")} for each in (start, run)))
    assert train(tuned, tmp_path / "tuned") == 0
    assert all(math.isfinite(row["raw"]) for row in runs.curve(tmp_path / "tuned"))


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_the_official_sizes_are_told(size):
    wanted = ModelConfig.official(f"imf-{size}/2")

    def blank(*shape):
        return np.broadcast_to(np.float32(0), shape)

    width, hidden = wanted.hidden_size, wanted.mlp_hidden
    params = {
        "x_embedder/proj/kernel": blank(2, 2, 4, width),
        "y_embedder/embedding_table/_flax_embedding/embedding": blank(1001, width),
        "u_heads_0/mlp/w1/_flax_linear/kernel": blank(width, hidden),
        **{f"u_heads_{i}/attn/q_norm/kernel": blank(64) for i in range(8)},
        **{f"shared_blocks_{i}/attn/q_norm/kernel": blank(64) for i in range(wanted.depth - 8)},
    }
    assert hidden == {"B": 2048}.get(size, 2730)
    assert infer_improved({f"params/net/{path}": x for path, x in params.items()}) == wanted
    # another width of the MLPs
    other = infer_improved(params | {"u_heads_0/mlp/w1/_flax_linear/kernel": blank(width, 3 * hidden + 1)})
    assert other.mlp_hidden == 3 * hidden + 1


def test_what_the_formats_lack(converted, tmp_path):
    weights, params = converted
    code, _, err = run_convert(FORMER / "run", "--to", "imf", "--out", tmp_path / "a.pth")
    assert code == 2 and "model: got '1x8/2', wanted an imf network with heads for u and v" in err
    code, _, err = run_convert(weights, "--to", "zhuyu", "--out", tmp_path / "a.pt")
    assert code == 2 and "wanted MeanFlow's own DiT for this format" in err
    # a network that is not whole
    part = {path: x for path, x in params.items() if "u_heads_0/attn/q_norm" not in path}
    write_flax(tmp_path / "checkpoint_1", part, part, 1)
    code, _, err = run_convert(tmp_path / "checkpoint_1", "--to", "weights", "--out", tmp_path / "w.safetensors")
    assert code == 2 and "got no 'u_heads_0/attn/q_norm/kernel', wanted the official iMF network" in err
    assert to_official(load_checkpoint(weights)[0], 1).keys() == {path.removeprefix("net/") for path in params}
