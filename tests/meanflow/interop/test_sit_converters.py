"""SiT, DiT and SiT-based MeanFlows (.pt): equal outputs where there can be, and what is refused."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")
from conversions import SiT, assert_equal, run_convert

from meanflow.config import ModelConfig
from meanflow.errors import UserError
from meanflow.interop import convert
from meanflow.interop.sit import from_dit, from_sit, from_zhuyu, to_zhuyu
from meanflow.interop.weights import load_checkpoint
from meanflow.model.build import build_net
from meanflow.model.dit import Dual, position_table
from meanflow.storage.checkpoint import load_weights
from meanflow.training.trainer import train


def inputs(count=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(count, 4, 8, 8, generator=generator, dtype=dtype)
    r, t = torch.rand(2, count, generator=generator, dtype=dtype).sort(0).values
    return z, r, t, torch.arange(count) % 6


@pytest.mark.parametrize("outputs", [1, 2], ids=["velocity", "learn_sigma"])
@pytest.mark.parametrize("dtype, bar", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_sit_converter_starts_as_the_velocity_field(outputs, dtype, bar):
    sit = SiT(outputs=outputs).to(dtype)
    if dtype == torch.float64:
        sit.pos_embed.data = position_table(32, 4, dtype=dtype)[None]
    tensors, model = from_sit(sit.state_dict(), num_heads=4)
    assert model == ModelConfig(2, 32, 4, 2, input_size=8, in_channels=4, num_classes=5)
    net = build_net(model).to(dtype)
    net.load_state_dict(tensors)
    z, r, t, y = inputs(dtype=dtype)
    # SiT runs from noise at 0 to data at 1 and predicts data - noise; here v = noise - data and t = 1 is noise
    wanted = -sit(z, 1 - t, y)
    for other in (r, t, torch.zeros_like(t)):
        error = (net(z, other, t, y) - wanted).abs().max() / wanted.abs().max()
        assert error <= bar
    # the derivative along (v, 0, 1) is then SiT's own
    du_dt = net(z, r, t, y, tangents=(wanted, None, torch.ones_like(t)))[1]
    _, sits = torch.func.jvp(lambda z, t: -sit(z, 1 - t, y), (z, t), (wanted, torch.ones_like(t)))
    assert (du_dt - sits).abs().max() / sits.abs().max() <= 100 * bar


def test_sit_converter_leaves_the_new_embedding_to_be_trained():
    tensors, model = from_sit(SiT().state_dict(), num_heads=4)
    net = build_net(model)
    net.load_state_dict(tensors)
    z, r, t, y = inputs(dtype=torch.float32)
    net(z, r, t, y).square().mean().backward()
    assert net.h_embedder.mlp[2].weight.grad.abs().max() > 0
    assert tensors["h_embedder.mlp.0.weight"].std() > 0.01 and not tensors["h_embedder.mlp.2.weight"].any()
    again, _ = from_sit(SiT().state_dict(), num_heads=4)
    assert_equal(tensors, again)


def test_sit_converter_starts_a_run(tmp_path):
    sit = SiT(channels=1, classes=10)
    torch.save({"ema": sit.state_dict()}, tmp_path / "sit.pt")
    file = tmp_path / "start.safetensors"
    code, _, err = run_convert(
        tmp_path / "sit.pt", "--format", "sit", "--num-heads", 4, "--to", "weights", "--out", file
    )
    assert code == 0, err
    tensors, config, _ = load_weights(file)
    options = runs.tiny(init=str(file), steps=1, save_every=1)
    options = replace(options, model=ModelConfig(**config["model"]), optim=replace(options.optim, lr=1e-9))
    train(options, tmp_path / "run")
    after, *_ = load_checkpoint(tmp_path / "run", "model")
    for name, x in tensors.items():
        torch.testing.assert_close(after[name], x, rtol=0, atol=1e-8)


def test_dit_converter_says_that_it_is_a_start_alone(tmp_path):
    dit = SiT()
    # an embedding that changes slowly from step to step, as trained ones do
    dit.t_embedder.mlp[0].weight.data.reshape(32, 2, 128)[:, :, :90] = 0
    tensors, model, error = from_dit(dit.state_dict(), num_heads=4)
    theirs = dit.state_dict()
    changed = {
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "t_embedder.mlp.0.weight",
        "t_embedder.mlp.0.bias",
    }
    kept = [name for name in theirs if name not in changed | {"pos_embed"}]
    assert len(kept) > 20 and all(torch.equal(tensors[name], theirs[name]) for name in kept)
    # its first outputs of every pixel are the noise
    rows = theirs["final_layer.linear.weight"].reshape(4, 8, 32)[:, :4].reshape(16, 32)
    assert torch.equal(tensors["final_layer.linear.weight"], rows)
    assert not tensors["h_embedder.mlp.2.weight"].any() and error < 0.03
    # the embedding at t is DiT's at the step of the same ratio of noise to signal
    net = build_net(model)
    net.load_state_dict(tensors)
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for step in (100, 500, 900):
        ratio = np.sqrt((1 - signal[step]) / signal[step])
        t = torch.tensor([ratio / (1 + ratio)], dtype=torch.float32)
        got = net.t_embedder(Dual(t), torch.float32).primal
        wanted = dit.embed("t_embedder", torch.tensor([float(step)]))
        assert (got - wanted).norm() / wanted.norm() < 0.05
    torch.save(dit.state_dict(), tmp_path / "dit.pt")
    weights = convert.load(tmp_path / "dit.pt", "dit", num_heads=4)
    assert "no flow-matching model" in weights.note and "relative error of" in weights.note


@pytest.mark.parametrize("gap", ["r_embedder", "t_embedder"], ids=["two embeddings", "one embedding"])
def test_zhuyu_converter_keeps_time_and_gap(gap):
    theirs = SiT(outputs=1, gap=gap).double()
    theirs.pos_embed.data = position_table(32, 4, dtype=torch.float64)[None]
    tensors, model = from_zhuyu(theirs.state_dict(), num_heads=4)
    net = build_net(model).double()
    net.load_state_dict(tensors)
    z, r, t, y = inputs()
    wanted = theirs(z, t, y, r)
    assert (net(z, r, t, y) - wanted).abs().max() / wanted.abs().max() <= 1e-12
    back = to_zhuyu(tensors, model)
    if gap == "r_embedder":
        mine = theirs.float().state_dict()
        assert_equal({k: x.float() for k, x in back.items()}, mine)


def test_zhuyu_converter_there_and_back_by_command(tmp_path):
    state = SiT(outputs=1, gap="r_embedder").state_dict()
    other = {name: x + 1 for name, x in state.items() if name != "pos_embed"} | {"pos_embed": state["pos_embed"]}
    args = argparse.Namespace(model="SiT-XL/2", cfg_prob=0.1)
    torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": args, "steps": 50000}, tmp_path / "a.pt")
    code, _, err = run_convert(tmp_path / "a.pt", "--out", tmp_path / "b")
    assert code == 2 and "format: got '', wanted one of sit, dit, zhuyu, imf for a .pt file; name it by --format" in err
    options = ("--format", "zhuyu", "--num-heads", 4)
    code, out, err = run_convert(tmp_path / "a.pt", "--out", tmp_path / "b", *options)
    assert code == 0 and "step 50000 from zhuyu's a.pt" in out, err
    code, _, err = run_convert(tmp_path / "b", "--to", "zhuyu", "--out", tmp_path / "c.pt")
    assert code == 0, err
    again = torch.load(tmp_path / "c.pt", weights_only=True)
    assert again["steps"] == 50000
    assert_equal(again["ema"], state)
    # a factor on the latents of its own
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())["recipe"]["config"]["data"]["scale"] == 0.18125
    file, name = tmp_path / "d.safetensors", "x_embedder.proj.bias"
    code, _, err = run_convert(tmp_path / "a.pt", "--to", "weights", "--out", file, "--weights", "model", *options)
    assert code == 0, err
    assert torch.equal(load_weights(file)[0][name], state[name] + 1)


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("case", ["malicious", "truncated", "text", "number", "parts", "other network"])
def test_converter_refuses_a_bad_pt_file_in_one_line(tmp_path, case):
    path, victim = tmp_path / "x.pt", tmp_path / "victim"
    held = {
        "malicious": {"ema": SiT().state_dict(), "args": Malicious(victim)},
        "number": 5,
        "parts": {"ema": {"x": "no tensor"}},
        "other network": {"conv.weight": torch.ones(3)},
    }
    torch.save(held.get(case, SiT().state_dict()), path)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    if case == "text":
        path.write_text("<html>not found</html>")
    code, _, err = run_convert(path, "--format", "sit", "--num-heads", 4, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("convert.py: error: checkpoint: got") and err.count("\n") == 1, err
    assert not victim.exists() and not (tmp_path / "out").exists()


BAD_NETWORKS = {
    "pos_embed: got '0.1 away'": lambda s: s | {"pos_embed": s["pos_embed"] + 0.1},
    "checkpoint: got ['blocks.0.attn.q_norm": lambda s: s | {"blocks.0.attn.q_norm.weight": torch.ones(8)},
    "final_layer: got 48": lambda s: s | {"final_layer.linear.weight": torch.ones(48, 32)},
    "such as ['blocks.1.mlp.fc2.b": lambda s: {k: x for k, x in s.items() if k != "blocks.1.mlp.fc2.bias"},
}


@pytest.mark.parametrize("message, change", BAD_NETWORKS.items(), ids=BAD_NETWORKS)
def test_sit_converter_refuses_another_network(tmp_path, message, change):
    torch.save(change(SiT().state_dict()), tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        convert.load(tmp_path / "x.pt", "sit", num_heads=4)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_converter_asks_for_heads_it_cannot_know():
    with pytest.raises(UserError, match="num_heads: got None.*depth 2 and width 32.*--num-heads"):
        from_sit(SiT().state_dict())
