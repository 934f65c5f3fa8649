"""The rungs of improved MeanFlow's ladder, tiny: trained, sampled from, and as pipelines."""

import math
import re
from dataclasses import replace

import pytest
import runs
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from meanflow.errors import UserError
from meanflow.interop import convert
from meanflow.interop.transformer import make_transformer
from meanflow.interop.weights import load_ema
from meanflow.method.sampling import sample
from meanflow.training.trainer import train

TOLD = {"v-head-guided": (), "omega": (3.0,), "interval": (3.0, 0.2, 0.7), "in-context": (3.0, 0.2, 0.7)}


@pytest.mark.parametrize("rung", TOLD)
def test_a_rung_trains_and_samples(command, tmp_path, rung):
    run, told = tmp_path / "run", TOLD[rung]
    # gates start at zero, and at this rate two steps move them
    config = runs.rung(rung, steps=2, save_every=2, sample_every=2, log_every=1)
    config = replace(config, optim=replace(config.optim, lr=0.1, warmup_steps=0))
    assert train(config, run) == 0
    assert [math.isfinite(row["grad_norm"]) for row in runs.curve(run)] == [True, True]

    # by the command
    for guidance in dict.fromkeys(((), told)):
        options = ("--guidance", *guidance) if guidance else ()
        code, _, err = command("sample", run, "--count", 3, "--device", "cpu", *options)
        assert code == 0, err
    assert len(list((run / "generated").glob("*.npz"))) == 1 + (len(told) > 0)

    # as a pipeline, which has no head for v, and back, where it begins as a copy of u's
    weights = convert.load(run, "run")
    convert.save_pipeline(convert.make_pipeline(weights), tmp_path / "pipeline")
    again = convert.load(tmp_path / "pipeline", "pipeline")
    assert again.model == weights.model == config.model and again.note == convert.NO_V_HEAD
    last, copied = "v_final_layer.linear.weight", "blocks.2.attn.qkv.weight"
    assert again.tensors.keys() == weights.tensors.keys()
    for name, x in weights.tensors.items():
        assert name.startswith(("blocks.2.", "v_final_layer.")) or torch.equal(again.tensors[name], x), name
    assert torch.equal(again.tensors[last], again.tensors[last[2:]])
    assert torch.equal(again.tensors[copied], again.tensors[copied.replace("2", "1", 1)])
    pipeline = convert.load_pipeline(tmp_path / "pipeline")
    noise, y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    scale, *interval = told or (None,)
    images = pipeline(
        y, latents=noise, output_type="latent", num_inference_steps=2, guidance_scale=scale,
        guidance_interval=interval or None,
    ).images  # fmt: skip
    net = load_ema(run, torch.device("cpu"))[0]
    assert torch.equal(images, sample(net, noise, y, (1.0, 0.5, 0.0), told))

    # other code bases do not have it
    for to in ("official", "zhuyu"):
        code, _, err = command("convert", run, "--to", to, "--out", tmp_path / to)
        line = err.rpartition("convert.py: error: ")[2]
        assert code == 2 and re.match("model: got {.*'head_depth': 1}, wanted MeanFlow's own DiT .*\n$", line), err


def test_modulated_modern_blocks_make_no_pipeline():
    model = replace(runs.tiny("digits-imf").model, conditioning="adaln")
    with pytest.raises(
        UserError, match="model: got {'conditioning': 'adaln'}, wanted improved MeanFlow's own network, or a"
    ):
        make_transformer(model, "interval")
