"""The pipeline and its model: what they draw, and what diffusers asks of such classes."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKL
from diffusers.callbacks import PipelineCallback

from meanflow.interop.pipeline import MeanFlowPipeline
from meanflow.interop.scheduler import MeanFlowScheduler
from meanflow.interop.transformer import MeanFlowTransformer2DModel
from meanflow.method.sampling import sample

SHAPE = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 10}
NAMES = {0: "tench", 1: "goldfish, Carassius auratus"} | {i: f"name {i}, crane" for i in range(2, 10)}


def model(channels: int, seed: int = 0) -> MeanFlowTransformer2DModel:
    net = MeanFlowTransformer2DModel(**SHAPE, in_channels=channels)
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15, generator=generator)
    return net.eval()


def autoencoder(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        **config,
    )


def build(vae: AutoencoderKL | None = None, **options) -> MeanFlowPipeline:
    net = model(1 if vae is None else 4)
    pipeline = MeanFlowPipeline(net, MeanFlowScheduler(), vae, id2label=NAMES, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["pixels", "latents"])
def pipeline(request):
    return build(autoencoder(scaling_factor=0.5) if request.param == "latents" else None)


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def draw(pipeline, labels=(1, 2), **options) -> np.ndarray:
    options = {"generator": seed(), "num_inference_steps": 2, "output_type": "np"} | options
    return pipeline(list(labels), **options).images


def assert_same_images(a: MeanFlowPipeline, b: MeanFlowPipeline) -> None:
    assert torch.equal(draw(a, output_type="latent"), draw(b, output_type="latent"))
    # oneDNN's convolutions round by where their weights lie in memory
    np.testing.assert_allclose(draw(a), draw(b), rtol=0, atol=0 if a.vae is None else 1e-6)


def reload(pipeline, folder, **options):
    pipeline.save_pretrained(folder)
    again = MeanFlowPipeline.from_pretrained(folder, **options)
    again.set_progress_bar_config(disable=True)
    return again


@pytest.mark.parametrize("times", [(1, 0), (1, 0.5, 0), (1, 0.8, 0.3, 0.1, 0)])
def test_pipeline_draws_what_the_sampler_does(times):
    pipeline = build()
    noise, labels = torch.randn(3, 1, 8, 8, generator=seed()), torch.tensor([1, 9, 10])
    got = pipeline(labels, timesteps=times, latents=noise, output_type="latent").images
    wanted = sample(lambda z, r, t, y: pipeline.transformer(z, t, r, y).sample, noise, labels, times)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert pipeline.num_timesteps == len(times) - 1


def test_pipeline_saved_and_loaded_draws_the_same(pipeline, tmp_path):
    again = reload(pipeline, tmp_path)
    assert_same_images(pipeline, again)
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert "diffusion_pytorch_model.safetensors" in files and not any(f.endswith((".bin", ".pt")) for f in files)
    assert again.labels == pipeline.labels and (again.vae is None) == (pipeline.vae is None)
    assert not again.transformer.training
    # and once more from there
    assert_same_images(pipeline, reload(again, tmp_path / "again"))


def test_pipeline_keeps_the_schedule_of_its_scheduler(tmp_path):
    pipeline = build()
    wanted = draw(pipeline, timesteps=[1, 0.6, 0], num_inference_steps=None)
    pipeline.scheduler = MeanFlowScheduler(times=[1, 0.6, 0])
    again = reload(pipeline, tmp_path)
    assert np.array_equal(draw(again, num_inference_steps=None), wanted) and again.num_timesteps == 2


def test_pipeline_saves_and_loads_a_variant(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    again = MeanFlowPipeline.from_pretrained(tmp_path, variant="fp16")
    again.set_progress_bar_config(disable=True)
    assert_same_images(pipeline, again)


def test_pipeline_of_a_pickle_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return (print, ("arbitrary code ran",))

    pipeline = build()
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Runs()}, tmp_path / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="diffusion_pytorch_model"):
        MeanFlowPipeline.from_pretrained(tmp_path)


def test_pipeline_outputs_are_the_same_images(pipeline):
    as_np, as_pt = draw(pipeline), draw(pipeline, output_type="pt")
    channels = 1 if pipeline.vae is None else 3
    assert as_np.shape == (2, *([8, 8] if pipeline.vae is None else [16, 16]), channels)
    assert 0 <= as_np.min() and as_np.max() <= 1
    assert np.array_equal(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    pictures = draw(pipeline, output_type="pil")
    assert [p.mode for p in pictures] == ["L" if channels == 1 else "RGB"] * 2
    for picture, array in zip(pictures, as_np, strict=True):
        assert np.abs(np.asarray(picture).reshape(array.shape) - 255 * array).max() <= 0.5 + 1e-4
    assert draw(pipeline, output_type="latent").shape == (2, pipeline.transformer.in_channels, 8, 8)
    in_tuple = pipeline([1, 2], 2, generator=seed(), output_type="np", return_dict=False)
    assert isinstance(in_tuple, tuple) and np.array_equal(in_tuple[0], as_np)


def test_pipeline_decodes_by_the_vaes_configuration():
    latents = torch.randn(1, 4, 8, 8, generator=seed())
    for config in ({}, {"shift_factor": 0.1}, {"latents_mean": [0.1, 0, 0, 1], "latents_std": [1, 2, 3, 4]}):
        vae = autoencoder(scaling_factor=0.25, **config)
        pipeline = build(vae)
        pipeline.scheduler.step = lambda u, t, z, return_dict: (latents,)  # whatever is drawn
        z = latents / 0.25
        if "latents_std" in config:
            z = z * torch.tensor([1, 2, 3, 4]).reshape(1, 4, 1, 1) + torch.tensor([0.1, 0, 0, 1]).reshape(1, 4, 1, 1)
        with torch.no_grad():
            wanted = vae.decode(z + config.get("shift_factor", 0)).sample
        for pixels, images in (("symmetric", wanted / 2 + 0.5), ("unit", wanted)):
            pipeline.register_to_config(pixels=pixels)
            torch.testing.assert_close(draw(pipeline, [1], output_type="pt"), images.clamp(0, 1), rtol=0, atol=1e-6)


def test_pipeline_of_one_image_equals_it_in_a_batch(pipeline):
    batch = draw(pipeline, [1, 2, 3], generator=[seed(n) for n in range(3)])
    for n, label in enumerate([1, 2, 3]):
        alone = draw(pipeline, [label], generator=[seed(n)])
        np.testing.assert_allclose(alone[0], batch[n], rtol=0, atol=1e-5)
    assert not np.allclose(batch[0], batch[1], atol=1e-2)


def test_pipeline_draws_several_images_of_a_label(pipeline):
    several = draw(pipeline, [1, 2], num_images_per_label=2)
    np.testing.assert_allclose(several, draw(pipeline, [1, 1, 2, 2]), rtol=0, atol=1e-6)


def test_pipeline_labels_by_number_name_and_none(pipeline):
    by_number = draw(pipeline, [1, 2])
    assert np.array_equal(by_number, draw(pipeline, ["Carassius auratus", "name 2"]))
    assert np.array_equal(by_number, draw(pipeline, torch.tensor([1, 2])))
    assert np.array_equal(by_number, draw(pipeline, [[1], ["name 2"]]))
    assert pipeline.get_label_ids(["tench", "goldfish"]) == [0, 1] and pipeline.get_label_ids("tench") == [0]
    one = {"generator": seed(), "output_type": "np"}
    assert np.array_equal(
        pipeline("tench", **one | {"generator": seed()}).images, draw(pipeline, [0], num_inference_steps=1)
    )
    null = pipeline(None, **one | {"generator": seed()}).images
    assert np.array_equal(null, draw(pipeline, [10], num_inference_steps=1)) and len(null) == 1


def test_pipeline_calls_back_after_each_step(pipeline):
    seen = []

    def note(pipe, i, t, tensors):
        assert pipe is pipeline and set(tensors) == {"latents"}
        seen.append((i, float(t), tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}

    result = draw(pipeline, num_inference_steps=2, callback_on_step_end=note, output_type="latent")
    assert [(i, t) for i, t, _ in seen] == [(0, 1.0), (1, 0.5)]
    assert not result.any() and seen[1][2].any()
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs: got \['labels'\]"):
        draw(pipeline, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["labels"])


def test_pipeline_takes_diffusers_callbacks():
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    pipeline = build()
    halved = draw(
        pipeline, num_inference_steps=1, callback_on_step_end=Halve(cutoff_step_ratio=1.0), output_type="latent"
    )
    plain = draw(pipeline, num_inference_steps=1, output_type="latent")
    assert torch.equal(halved, plain / 2)


def test_pipeline_shows_progress_where_asked(capsys):
    pipeline = build()
    draw(pipeline)
    assert not capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=False)
    draw(pipeline)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipeline_in_half_precision_draws_about_the_same(pipeline, tmp_path, dtype):
    wanted = draw(pipeline)
    low = reload(pipeline, tmp_path, torch_dtype=dtype)
    assert {p.dtype for part in (low.transformer, low.vae) if part is not None for p in part.parameters()} == {dtype}
    bar = 0.02 if dtype == torch.float16 else 0.15
    assert np.abs(draw(low) - wanted).max() < bar
    assert np.abs(draw(pipeline.to(dtype)) - wanted).max() < bar


def test_pipeline_moves_its_parts(pipeline):
    assert {c.device.type for c in pipeline.components.values() if isinstance(c, torch.nn.Module)} == {"cpu"}
    pipeline.to("meta")
    assert {c.device.type for c in pipeline.components.values() if isinstance(c, torch.nn.Module)} == {"meta"}


def test_pipeline_slices_and_tiles_its_vae():
    pipeline = build(autoencoder())
    wanted = draw(pipeline)
    pipeline.vae.enable_slicing()
    np.testing.assert_allclose(draw(pipeline), wanted, rtol=0, atol=1e-5)
    pipeline.vae.enable_tiling()
    assert draw(pipeline).shape == wanted.shape


def test_pipeline_offloads_in_the_order_of_its_parts():
    # the offloading itself needs accelerate and a GPU: test_pipeline_offloads_to_the_cpu
    parts = MeanFlowPipeline.model_cpu_offload_seq.split("->")
    assert parts == [name for name, c in build(autoencoder()).components.items() if isinstance(c, torch.nn.Module)]


@pytest.mark.gpu
def test_pipeline_offloads_to_the_cpu(pipeline):
    pytest.importorskip("accelerate", reason="offloading needs accelerate")
    wanted = draw(pipeline)
    pipeline.enable_model_cpu_offload()
    np.testing.assert_allclose(draw(pipeline), wanted, rtol=0, atol=1e-2)
    assert pipeline.transformer.device.type == "cpu"


REFUSED = {
    "class_labels: got 11": {"labels": [11]},
    "class_labels: got -1": {"labels": [-1]},
    "class_labels: got 1.5": {"labels": [1.5]},
    "class_labels: got 'dragon'": {"labels": ["dragon"]},
    "class_labels: got 'crane'": {"labels": ["crane"]},
    "class_labels: got []": {"labels": []},
    "num_images_per_label: got 0": {"num_images_per_label": 0},
    "output_type: got 'jpeg'": {"output_type": "jpeg"},
    "generator: got 1": {"generator": [seed()]},
    "latents: got (1, 1, 8, 8)": {"latents": torch.zeros(1, 1, 8, 8)},
    "steps: got 0": {"num_inference_steps": 0},
    "times: got (0.0, 1.0)": {"timesteps": [0, 1], "num_inference_steps": None},
    "timesteps: got [1, 0]": {"timesteps": [1, 0]},
}


@pytest.mark.parametrize("message, options", REFUSED.items(), ids=REFUSED)
def test_pipeline_refuses_what_it_cannot_draw(message, options):
    with pytest.raises(ValueError) as error:
        draw(build(), **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_pipeline_of_latents_without_a_vae_says_so():
    pipeline = MeanFlowPipeline(model(4), MeanFlowScheduler())
    assert draw(pipeline, output_type="latent").shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="output_type: got 'pil' for images of 4 channels"):
        draw(pipeline, output_type="pil")


def test_pipeline_model_card(tmp_path):
    recipe = {"origin": "a run", "step": 300, "weights": "ema", "config": {"train": {"steps": 300}}}
    pipeline = build(recipe=recipe, scores=[{"protocol": "official", "fid": 12.3456789, "count": 50000}])
    again = reload(pipeline, tmp_path / "digits")
    card = (tmp_path / "digits" / "README.md").read_text()
    assert 'from_pretrained("digits")' in card and "step 300, weights: ema" in card and '"steps": 300' in card
    assert "| official | 12.35 | 50000 |" in card and "Licence" in card
    assert again.config.recipe == recipe and json.loads(json.dumps(again.config.scores))[0]["count"] == 50000
    # the card's own code runs
    code = card.split("```python\n")[1].split("```")[0].replace('"digits"', repr(str(tmp_path / "digits")))
    scope = {}
    exec(code, scope)
    assert len(scope["images"]) == 3
    # an edited card stays
    (tmp_path / "digits" / "README.md").write_text("mine")
    again.save_pretrained(tmp_path / "digits")
    assert (tmp_path / "digits" / "README.md").read_text() == "mine"


# --- the model alone ---


def test_pipeline_model_saved_and_loaded(tmp_path):
    net = model(4)
    net.save_pretrained(tmp_path)
    again, info = MeanFlowTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())
    public = [{k: v for k, v in each.config.items() if not k.startswith("_")} for each in (net, again)]
    assert public[0] == public[1] and public[0].items() > SHAPE.items()
    assert again.pos_embed.equal(net.pos_embed)
    inputs = (torch.randn(2, 4, 8, 8), torch.ones(2), torch.zeros(2), torch.tensor([1, 2]))
    assert torch.equal(net(*inputs).sample, again(*inputs).sample)
    assert torch.equal(net(*inputs).sample, net(*inputs, return_dict=False)[0])
    assert torch.equal(net(*inputs[:3]).sample, net(*inputs[:3], torch.tensor([10, 10])).sample)


def test_pipeline_model_keeps_its_layers_in_eight_bits():
    pipeline = build()
    wanted = draw(pipeline)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipeline.transformer.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    assert 0 < np.abs(draw(pipeline) - wanted).max() < 0.2


def test_pipeline_model_trains():
    net = model(4).train()
    net(torch.randn(2, 4, 8, 8), torch.ones(2), torch.zeros(2), torch.tensor([1, 2])).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_pipeline_model_checkpoints_its_blocks():
    inputs = (torch.randn(2, 4, 8, 8), torch.ones(2), torch.zeros(2), torch.tensor([1, 2]))
    grads, saved = [], []
    for enable in (False, True):
        net = model(4).train()
        if enable:
            net.enable_gradient_checkpointing()
        assert net.is_gradient_checkpointing == enable
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            loss = net(*inputs).sample.square().mean()
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
        saved.append(sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and saved[1] < saved[0] / 2
    net.disable_gradient_checkpointing()
    assert not net.is_gradient_checkpointing


def test_pipeline_model_in_shards(tmp_path):
    net = model(4)
    net.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = MeanFlowTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())


def test_pipeline_model_refuses_a_shape():
    with pytest.raises(ValueError, match="model.num_heads: got 3"):
        MeanFlowTransformer2DModel(**SHAPE | {"num_heads": 3})
