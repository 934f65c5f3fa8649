"""Weights of others: whatever wrapped, averaged, rounded or renamed them, they are found, or refused by name."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import runs
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")
from conversions import SiT, assert_equal
from safetensors.torch import save_file

from meanflow.apps import page
from meanflow.errors import UserError
from meanflow.interop import convert
from meanflow.interop.formats import find_format
from meanflow.interop.official_weights import from_official, to_official
from meanflow.interop.weights import load_checkpoint
from meanflow.storage.checkpoint import save_weights
from meanflow.storage.flax_files import write_flax
from meanflow.storage.foreign import full, read_network
from meanflow.training.trainer import train

SIT = SiT().state_dict()


def inside(prefix: str, state: dict = SIT) -> dict:
    return {prefix + name: x for name, x in state.items()}


def in_blocks(word: str) -> dict:
    return {name.replace("blocks.0.", f"blocks.0.{word}."): x for name, x in SIT.items()}


def averaged(net: nn.Module) -> dict:
    return torch.optim.swa_utils.AveragedModel(net).state_dict()


def of_a_user(net: nn.Module) -> dict:
    """A module of one's own around the network, with other things in it."""
    whole = nn.Module()
    whole.net, whole.teacher = net, nn.Linear(3, 3)
    return whole.state_dict()


OTHER = {name: x + 1 for name, x in SIT.items()}
WRAPPED = {
    "plain": lambda: SIT,
    "DDP": lambda: {"ema": inside("module.")},
    "compiled": lambda: {"ema": inside("_orig_mod.")},
    "compiled, then DDP": lambda: inside("module._orig_mod."),
    "DDP, then compiled": lambda: inside("_orig_mod.module."),
    "a block compiled": lambda: {"model": OTHER, "ema": in_blocks("_orig_mod")},
    "FSDP": lambda: in_blocks("_fsdp_wrapped_module") | {"n": torch.tensor(0)},
    "checkpointed": lambda: in_blocks("_checkpoint_wrapped_module._orig_mod"),
    "AveragedModel": lambda: {"ema": averaged(SiT())},
    "AveragedModel, by its counter": lambda: {"net": OTHER, "other": averaged(nn.DataParallel(SiT()))},
    "ema in front": lambda: inside("ema.") | inside("model.", OTHER),
    "ema-pytorch": lambda: inside("ema_model.") | inside("online_model.", OTHER) | {"initted": torch.tensor([True])},
    "a module of one's own": lambda: {"state_dict": of_a_user(SiT()), "epoch": 3},
    "an optimizer by names": lambda: {"ema": SIT, "model": OTHER, "opt": {"exp_avg": OTHER, "exp_avg_sq": OTHER}},
    "a dict that holds itself": lambda: (held := {"ema": SIT}) | {"self": held},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_wrapped_a_network_is_taken_off(tmp_path, wrap):
    torch.save(wrap(), tmp_path / "x.pt")
    assert_equal(dict(read_network(tmp_path / "x.pt")[0]), SIT)


def test_either_part_is_found_and_said(tmp_path):
    for name, held in {"both": {"model": OTHER, "ema": SIT}, "flat": inside("ema.") | inside("net.", OTHER)}.items():
        torch.save(held, tmp_path / name)
        assert_equal(read_network(tmp_path / name, "ema")[0], SIT)
        assert_equal(read_network(tmp_path / name, "model")[0], OTHER)
    torch.save({"model": SIT, "step": 7}, tmp_path / "x.pt")
    weights = convert.load(tmp_path / "x.pt", "sit", num_heads=4)
    assert weights.which == "model" and weights.step == 7 and "It holds no 'ema'" in weights.note
    torch.save({"ema": averaged(SiT())}, tmp_path / "x.pt")
    assert read_network(tmp_path / "x.pt", "model")[2] == "ema"
    torch.save({"teacher": SIT, "student": OTHER}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"with several networks, under 'teacher\.', 'student\.', wanted one of them"):
        read_network(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float8_e4m3fn), ids=str)
@pytest.mark.parametrize("family", ("sit", "zhuyu"))
def test_half_precision_is_compared_with_its_own_rounding(tmp_path, dtype, family):
    state = SiT(outputs=1, gap="r_embedder" if family == "zhuyu" else None).state_dict()
    table = state["pos_embed"] if dtype == torch.float8_e4m3fn else state["pos_embed"].to(dtype)
    low = {name: x.to(dtype) for name, x in state.items()} | {"pos_embed": table}
    torch.save(low, tmp_path / "low.pt")
    torch.save({name: x.float() for name, x in low.items()}, tmp_path / "high.pt")
    weights, wanted = (convert.load(tmp_path / name, family, num_heads=4) for name in ("low.pt", "high.pt"))
    # converted in fp32: the numbers of a file in fp32 that holds the same
    assert_equal(weights.tensors, wanted.tensors)
    torch.save(low | {"pos_embed": (table.float() + 0.01).to(table.dtype)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="pos_embed: got '0.01"):
        convert.load(tmp_path / "x.pt", family, num_heads=4)


def test_half_precision_of_the_official_code(tmp_path):
    tensors = convert.load(_sit(tmp_path), "sit", num_heads=4).tensors
    arrays = {f"params/wrapped/net/{path}": x.astype("float16") for path, x in to_official(tensors).items()}
    write_flax(tmp_path / "checkpoint_1", arrays, arrays, 1)
    found = convert.load(tmp_path / "checkpoint_1", "official", num_heads=4, input_size=8).tensors
    assert_equal(found, {name: x.half().float() for name, x in tensors.items()})
    with pytest.raises(UserError, match="70 arrays of 35 names', wanted one network"):
        both = arrays | {"teacher/" + path.removeprefix("params/"): x for path, x in arrays.items()}
        write_flax(tmp_path / "checkpoint_2", both, both, 1)
        convert.load(tmp_path / "checkpoint_2", "official", num_heads=4)
    assert_equal(from_official({f"a/b/{path}": x for path, x in to_official(tensors).items()}), tensors)


def _sit(folder):
    torch.save(SIT, folder / "sit.pt")
    return folder / "sit.pt"


UNKNOWN = {
    "'blocks.0.attn.qkv.weight'": {"blocks.0.attn.qvk.weight": torch.ones(3)},
    "'blocks.1.mlp.fc2.bias' and 'blocks.1.mlp.fc1.bias'": {"blocks.1.mlp.fc3.bias": torch.ones(3)},
    "'y_embedder.embedding_table.weight'": {"y_embedder.table.weight": torch.ones(3)},
}


@pytest.mark.parametrize("near, more", UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_name_is_shown_with_the_two_nearest(tmp_path, near, more):
    torch.save(SIT | more, tmp_path / "x.pt")
    with pytest.raises(UserError) as error:
        convert.load(tmp_path / "x.pt", "sit", num_heads=4)
    assert f"such as {list(more)}, nearest to it " in str(error.value) and near in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_name_that_tells_the_shape_is_shown_with_the_two_nearest(tmp_path):
    state = {name.replace("embedding_table", "table"): x for name, x in SIT.items()}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no y_embedder.embedding_table.weight, nearest to it 'y_embedder.table.weight"):
        convert.load(tmp_path / "x.pt", "sit", num_heads=4)


def test_without_the_first_layer_the_two_nearest_are_shown(tmp_path):
    state = {name.replace("x_embedder.proj", "x_embed.proj"): x for name, x in SIT.items()}
    torch.save({"ema": state}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no x_embedder.proj.weight, nearest to it 'ema.x_embed.proj.weight' and '"):
        read_network(tmp_path / "x.pt")


# --- one loader ---


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One trained network in all that the commands take, by name."""
    folder = tmp_path_factory.mktemp("sources")
    train(runs.tiny(), folder / "run")
    weights, config, path, step = load_checkpoint(folder / "run")
    names = ("exported.safetensors", "exported.pt", "exported.bin", "exported")
    for name in names:
        save_weights(folder / name, weights, config, step)
    page.load(folder / "run", torch.device("cpu"), torch.float32).pipeline.save_pretrained(folder / "pipeline")
    return {"run": folder / "run", "checkpoint": path} | {name: folder / name for name in (*names, "pipeline")}


KINDS = ("run", "checkpoint", "exported.safetensors", "exported.pt", "exported.bin", "exported", "pipeline")


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_reads_every_kind(sources, tmp_path, command, kind):
    wanted = load_checkpoint(sources["run"])[0]
    assert_equal(load_checkpoint(sources[kind])[0], wanted)
    studio = page.load(sources[kind], torch.device("cpu"), torch.float32)
    assert_equal(studio.pipeline.transformer.state_dict(), wanted)
    code, _, err = command("export", sources[kind], "--out", tmp_path / "weights")
    assert code == 0, err
    assert_equal(load_checkpoint(tmp_path / "weights")[0], wanted)
    code, _, err = command("sample", sources[kind], "--count", 4, "--device", "cpu", "--out", tmp_path / "a")
    assert code == 0, err
    train(runs.tiny(init=str(sources[kind]), steps=1), tmp_path / "run")
    started = load_checkpoint(tmp_path / "run", "model")[0]
    assert max(float((started[name] - x).abs().max()) for name, x in wanted.items()) < 1e-3


class Judge:
    """Says which network it was given."""

    accuracy_real = 1.0

    def __init__(self, data, seed):
        pass

    def floor(self):
        return 0.0

    def score_net(self, net, device, times, guidance):
        return SimpleNamespace(as_dict=lambda: {"sum": math.fsum(p.double().sum() for p in net.parameters())})


def test_evaluation_reads_every_kind(sources, command, monkeypatch):
    monkeypatch.setattr("meanflow.apps.evaluate.ClassifierJudge", Judge)
    wanted = math.fsum(x.double().sum() for x in load_checkpoint(sources["run"])[0].values())
    for kind in KINDS:
        code, out, err = command("evaluate", sources[kind], "--json", "--device", "cpu")
        assert code == 0, err
        assert json.loads(out)["sum"] == wanted and json.loads(out)["step"] == 10


def test_what_is_made_lies_beside_what_it_is_made_of(sources, tmp_path, command):
    shutil.copy(sources["exported.bin"], tmp_path / "w")
    shutil.copytree(sources["pipeline"], tmp_path / "p")
    for seed, source in enumerate((tmp_path / "w", tmp_path / "p")):
        code, _, err = command("sample", source, "--count", 1, "--device", "cpu", "--seed", seed)
        assert code == 0, err
    assert len(list((tmp_path / "generated").glob("*.png"))) == 2


NOT_OURS = {
    "pt": lambda path: torch.save(SIT, path),
    "safetensors": lambda path: save_file(SIT, path),
    "legacy": lambda path: torch.save(SIT, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("ending", (".pt", ".safetensors", ""))
@pytest.mark.parametrize("write", NOT_OURS.values(), ids=NOT_OURS)
def test_a_file_of_another_family_is_known_by_what_it_holds(tmp_path, write, ending):
    path = tmp_path / f"x{ending}"
    write(path)
    assert find_format(path) == ""
    with pytest.raises(UserError, match="convert such a file by scripts/convert.py"):
        load_checkpoint(path)
    assert_equal(dict(read_network(path)[0]), {name: full(x) for name, x in SIT.items()})
