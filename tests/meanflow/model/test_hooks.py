"""Every parameter is read within its own module's forward, so that what casts or loads it there is not missed."""

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate, which offloads, is not installed")
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting  # noqa: E402

from meanflow.config import ModelConfig  # noqa: E402
from meanflow.errors import UserError  # noqa: E402
from meanflow.interop.transformer import MeanFlowTransformer2DModel as Model  # noqa: E402
from meanflow.model.build import build_net  # noqa: E402

SHAPE = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 5}
CPU = torch.device("cpu")


def filled(net):
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return net.eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 4, 8, 8, generator=generator)
    return z, torch.ones(3), torch.tensor([0.0, 0.25, 1.0]), torch.tensor([1, 5, 2])


@torch.no_grad()
def draw(net: Model) -> Tensor:
    return net(*inputs()).sample


@pytest.fixture(scope="module")
def wanted():
    return draw(filled(Model(**SHAPE)))


@contextmanager
def locked(net):
    """Within it a parameter is NaN but while its module runs."""
    held = {p: p.data for p in net.parameters()}

    def unlock(module, _):
        for p in module._parameters.values():
            p.data = held[p]

    def lock(module, *_):
        for p in module._parameters.values():
            p.data = torch.full_like(held[p], torch.nan)

    layers = [module for module in net.modules() if module._parameters]
    hooks = [layer.register_forward_pre_hook(unlock) for layer in layers]
    hooks += [layer.register_forward_hook(lock) for layer in layers]
    for layer in layers:
        lock(layer)
    yield
    for handle in hooks:
        handle.remove()


@pytest.mark.parametrize("embedding", ("t,h", "t,r,h", "h"))
@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=("fp32", "bf16"))
def test_no_parameter_is_read_outside_its_module(embedding, dtype):
    net = filled(build_net(ModelConfig(2, 32, 2, 2, 8, 4, 5, time_embedding=embedding), dtype))
    z, t, r, y = inputs()
    with torch.no_grad():
        plain, pair = net(z, r, t, y), net(z, r, t, y, tangents=(z, None, t))
        with locked(net):
            assert torch.equal(net(z, r, t, y), plain)
            assert all(torch.equal(a, b) for a, b in zip(net(z, r, t, y, tangents=(z, None, t)), pair, strict=True))


def test_containers_are_called_as_a_whole():
    net, called = filled(Model(**SHAPE)), set()
    for name, module in net.named_modules():
        # a list of blocks is no module that anyone calls
        if not isinstance(module, torch.nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    draw(net)
    assert called == {n for n, m in net.named_modules() if not isinstance(m, torch.nn.ModuleList)}


@pytest.mark.parametrize("storage", (torch.float8_e4m3fn, torch.bfloat16, torch.float16), ids=str)
def test_layers_are_cast_while_they_run(wanted, storage):
    net, rounded = filled(Model(**SHAPE)), filled(Model(**SHAPE))
    apply_layerwise_casting(net, storage_dtype=storage, compute_dtype=torch.float32)
    assert {p.dtype for p in net.parameters()} == {storage} and net.dtype == torch.float32
    for p in rounded.parameters():
        p.data = p.data.to(storage).float()
    assert torch.equal(draw(net), draw(rounded)) and not torch.equal(draw(net), wanted)


@pytest.mark.parametrize("level", ("leaf_level", "block_level"))
@pytest.mark.parametrize("to_disk", (False, True), ids=("memory", "disk"))
def test_groups_are_offloaded(wanted, tmp_path, level, to_disk):
    net = filled(Model(**SHAPE))
    apply_group_offloading(
        net, CPU, CPU, offload_type=level, num_blocks_per_group=1,
        offload_to_disk_path=str(tmp_path) if to_disk else None,
    )  # fmt: skip
    assert torch.equal(draw(net), wanted) and torch.equal(draw(net), wanted)


CHILDREN = ("x_embedder", "t_embedder", "h_embedder", "y_embedder", "blocks", "final_layer")
DEEPER = (
    "x_embedder", "t_embedder.mlp", "h_embedder.mlp.0", "h_embedder.mlp.2", "y_embedder", "blocks.0.attn",
    "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.adaLN_modulation", "blocks.1", "final_layer.linear",
    "final_layer.adaLN_modulation",
)  # fmt: skip
MAPS = {
    "cpu": "cpu",
    "the whole": {"": "cpu"},
    "auto": "auto",
    "children": dict.fromkeys(CHILDREN, "cpu"),
    "deeper": dict.fromkeys(DEEPER, "cpu"),
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_a_device_map_draws_the_same(wanted, tmp_path, device_map):
    filled(Model(**SHAPE)).save_pretrained(tmp_path)
    net = Model.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(draw(net), wanted)
    assert not any(buffer.is_meta for buffer in net.buffers())
    half = Model.from_pretrained(tmp_path, device_map=device_map, torch_dtype=torch.bfloat16)
    assert half.pos_embed.dtype == half.dtype == torch.bfloat16 and torch.equal(
        half.pos_embed, Model(**SHAPE).to(torch.bfloat16).pos_embed
    )


@pytest.mark.parametrize("names", (CHILDREN, DEEPER), ids=("children", "deeper"))
def test_what_a_device_map_leaves_on_the_disk_is_read(wanted, tmp_path, names):
    net = filled(Model(**SHAPE))
    places = dict.fromkeys(names, "disk")
    accelerate.dispatch_model(net, places, main_device="cpu", offload_dir=tmp_path)
    assert all(p.is_meta for p in net.parameters())
    assert torch.equal(draw(net), wanted)


OFFLOADS = {
    "to the CPU": lambda net, _: accelerate.cpu_offload(net, CPU),
    "with buffers": lambda net, _: accelerate.cpu_offload(net, CPU, offload_buffers=True),
    "twice": lambda net, _: accelerate.cpu_offload(accelerate.cpu_offload(net, CPU), CPU, offload_buffers=True),
    "to the disk": lambda net, folder: accelerate.disk_offload(net, folder, CPU),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_what_is_offloaded_draws_and_saves_the_same(wanted, tmp_path, offload):
    net = filled(Model(**SHAPE))
    offload(net, tmp_path / "weights")
    assert all(p.is_meta for p in net.parameters())
    assert torch.equal(draw(net), wanted)
    assert all(p.is_meta for p in net.parameters()) and not any(buffer.is_meta for buffer in net.buffers())
    net.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(Model.from_pretrained(tmp_path / "saved")), wanted)


def test_a_file_that_lacks_weights_is_refused(tmp_path):
    net = filled(Model(**SHAPE))
    net.blocks[1] = torch.nn.Sequential(net.blocks[1])  # whatever renames them
    net.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"transformer: got .*no \['blocks.1.adaLN.*unknown \['blocks.1.0.adaLN"
    ) as error:
        Model.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
