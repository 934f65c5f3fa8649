"""The pipeline of improved MeanFlow: told its guidance, saved and loaded, with the statistics of its latents."""

from types import SimpleNamespace

import numpy as np
import oracle_imf as oracle
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("msgpack", reason="msgpack is not installed")
from conversions import run_convert
from diffusers import AutoencoderKL

from meanflow.data.decoder import make_decoder
from meanflow.interop import convert
from meanflow.interop.pipeline import MeanFlowPipeline
from meanflow.interop.scheduler import MeanFlowScheduler
from meanflow.interop.transformer import ImfTransformer2DModel, MeanFlowTransformer2DModel
from meanflow.interop.weights import load_ema
from meanflow.method.sampling import even_times, sample
from meanflow.model.imf import ImfDiT
from meanflow.presets import preset
from meanflow.storage.flax_files import write_flax

SHAPE = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 10}
GUIDANCE = {"guidance_scale": 4.0, "guidance_interval": (0.3, 0.7)}
CPU = torch.device("cpu")


def build(**options) -> MeanFlowPipeline:
    net = ImfTransformer2DModel(**SHAPE | {"in_channels": 1, "head_depth": 1} | options)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=generator)
    for block in net.blocks:
        for x in block.mlp.padding:
            x.data.zero_()
    return quiet(MeanFlowPipeline(net.eval(), MeanFlowScheduler()))


def quiet(pipeline: MeanFlowPipeline) -> MeanFlowPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=2, **options):
    options = {"generator": torch.Generator().manual_seed(1), "output_type": "latent"} | options
    return pipeline([1, 9, 10], steps, **options).images


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_draws_what_the_sampler_does(steps):
    pipeline = build()
    net, labels = pipeline.transformer, torch.tensor([1, 9, 10])
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def velocity(z, r, t, y, omega, start, end):
        return ImfDiT.forward(net, z, r, t, y, omega, start, end)

    for options, told in ((GUIDANCE, (4, 0.3, 0.7)), ({}, (1, 0, 1)), ({"guidance_scale": 2}, (2, 0, 1))):
        wanted = sample(velocity, noise, labels, even_times(steps), told)
        assert torch.equal(draw(pipeline, steps, **options), wanted)
    assert not torch.allclose(draw(pipeline, steps, **GUIDANCE), draw(pipeline, steps), atol=1e-3)


def test_what_a_network_is_told_by_itself():
    sizes = {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 2}
    with torch.device("meta"):
        net = ImfTransformer2DModel(**sizes)
        told = ImfTransformer2DModel(**sizes, guidance_input="omega")
    assert MeanFlowPipeline(net, MeanFlowScheduler()).guidance(interval=(0.2, 0.9)) == (8.0, 0.2, 0.9)
    assert MeanFlowPipeline(told, MeanFlowScheduler()).guidance() == (8.0,)
    recipe = {"config": {"evaluation": {"guidance": [2.0, 0.1, 0.6]}}}
    pipeline = MeanFlowPipeline(net, MeanFlowScheduler(), recipe=recipe)
    assert pipeline.guidance() == (2.0, 0.1, 0.6) and pipeline.guidance(3.0) == (3.0, 0.1, 0.6)
    assert not hasattr(net, "v_heads") and len(net.u_heads) == 8


def test_saved_and_loaded_it_draws_the_same(tmp_path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    again = quiet(MeanFlowPipeline.from_pretrained(tmp_path))
    assert type(again.transformer) is ImfTransformer2DModel and again.transformer.guidance_input == "interval"
    wanted = draw(pipeline, **GUIDANCE)
    assert torch.equal(draw(again, **GUIDANCE), wanted)
    low = quiet(MeanFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16))
    for half in (low, pipeline.to(torch.bfloat16)):
        assert half.transformer.dtype == torch.bfloat16 and half.transformer.rope_cos.dtype == torch.float32
        assert (draw(half, **GUIDANCE) - wanted).abs().max() < 0.05 * wanted.abs().max()
    card = (tmp_path / "README.md").read_text()
    assert "Improved MeanFlow" in card and "guidance_scale=4, guidance_interval=(0.3, 0.7)" in card


REFUSED = {
    "guidance_scale: got 2, wanted none: this network is told nothing": ("dit", {"guidance_scale": 2}),
    "guidance_interval: got (0, 1), wanted none: this network is told nothing": ("dit", {"guidance_interval": (0, 1)}),
    "guidance_interval: got (0, 1), wanted omega; leave it out": ("omega", {"guidance_interval": (0, 1)}),
    "guidance_scale and guidance_interval: got (0.5, 0.0, 1.0), wanted omega": ("interval", {"guidance_scale": 0.5}),
    "guidance_scale and guidance_interval: got (1.0, 0.7, 0.3)": ("interval", {"guidance_interval": (0.7, 0.3)}),
    "guidance_scale and guidance_interval: got (1.0, 0.7)": ("interval", {"guidance_interval": (0.7,)}),
}


@pytest.mark.parametrize("message, case", REFUSED.items(), ids=REFUSED)
def test_what_it_refuses(message, case):
    told, options = case
    if told == "dit":
        pipeline = MeanFlowPipeline(MeanFlowTransformer2DModel(**SHAPE, in_channels=1), MeanFlowScheduler())
    else:
        pipeline = build(guidance_input=told)
    with pytest.raises(ValueError) as error:
        draw(pipeline, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official parameters behind the official samples, as a pipeline with an autoencoder."""
    folder, data = tmp_path_factory.mktemp("pipeline"), oracle.load("imf_sampling")
    source = oracle.load(str(data["params_from"]).removesuffix(".npz"))
    params = {f"net/{path}": x for path, x in oracle.group(source, "params/").items()}
    write_flax(folder / "checkpoint_1", params, params, 1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, **blocks).save_pretrained(
        folder / "vae"
    )
    size = oracle.settings(source, "config")["input_size"]
    code, _, err = run_convert(
        folder / "checkpoint_1", "--out", folder / "p", "--vae", folder / "vae", "--input-size", size
    )
    assert code == 0, err
    return folder / "p"


def test_it_gives_the_official_samples(official):
    data, pipeline = oracle.load("imf_sampling"), quiet(convert.load_pipeline(official))
    cases = {name: c for name, c in oracle.settings(data, "cases").items() if not isinstance(c["omega"], str)}
    assert len(cases) > 3
    for name, case in cases.items():
        told = {"guidance_scale": case["omega"], "guidance_interval": (case["t_min"], case["t_max"])}
        options = {"num_inference_steps": case["num_steps"], "latents": oracle.tensor(data["noise"], torch.float32)}
        got = pipeline(oracle.tensor(data["labels"]), output_type="latent", **told, **options).images
        oracle.assert_close(got, data[f"{name}/f32/samples"], "f32", "u", name)


def test_the_statistics_of_its_latents(official):
    pipeline, wanted = quiet(convert.load_pipeline(official)), preset("imf-b2").data
    assert tuple(pipeline.vae.config.latents_std) == wanted.latent_std and pipeline.vae.config.scaling_factor == 1
    net, config, _, _ = load_ema(official, CPU)
    assert (config.data.latent_mean, config.data.latent_std) == (wanted.latent_mean, wanted.latent_std)
    latents = draw(pipeline)
    images = make_decoder(config.data, CPU)(latents)
    np.testing.assert_allclose(draw(pipeline, output_type="pt"), (images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert config.objective.guidance_input == "interval" and len(net.v_heads) == len(net.u_heads)


def test_a_pipeline_without_a_recipe_is_known_by_its_network(tmp_path):
    pipeline = build(guidance_input="omega")
    pipeline.save_pretrained(tmp_path / "p")
    code, out, err = run_convert(tmp_path / "p", "--to", "imf", "--out", tmp_path / "MiT.pth")
    assert code == 0 and "It holds no head for v" in out, err
    net, config, _, _ = load_ema(tmp_path / "p", CPU)
    assert config.objective.guidance_input == "omega" and config.model == pipeline.transformer.model_config
    inputs = (torch.randn(2, 1, 8, 8), torch.zeros(2), torch.ones(2), torch.tensor([1, 2]), torch.full((2,), 3.0))
    assert torch.equal(net(*inputs), ImfDiT.forward(pipeline.transformer, *inputs))


def test_what_is_offloaded_is_saved():
    """As accelerate holds it: the learned tokens are the network's own, not a layer's."""
    net = build().transformer
    wanted = {name: x.clone() for name, x in net.state_dict().items()}
    held = {name: p.detach() for name, p in net.named_parameters(recurse=False)}
    for name in held:
        setattr(net, name, torch.nn.Parameter(held[name].to("meta")))
    net._hf_hook = SimpleNamespace(weights_map=held)
    state = net.state_dict()
    assert held and state.keys() == wanted.keys() and all(torch.equal(state[name], x) for name, x in wanted.items())
