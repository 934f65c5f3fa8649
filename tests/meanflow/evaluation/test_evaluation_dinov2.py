"""DINOv2's features for the FDD: from a local folder by the package transformers, where it is installed."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from meanflow.errors import UserError
from meanflow.evaluation.features import IMAGENET_MEAN, IMAGENET_STD, Extractor, load_dinov2
from meanflow.evaluation.inception import Inception
from meanflow.evaluation.protocols import clean_resize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="reads DINOv2; it is no dependency of the project")
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    transformers.Dinov2Model(config).save_pretrained(path)
    return path


def test_evaluation_dinov2_features(folder, tmp_path):
    from transformers import Dinov2Model

    save_file(Inception().state_dict(), tmp_path / "inception.safetensors")
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    extractor = Extractor(tmp_path / "inception.safetensors", "cpu", folder)
    got = extractor(images, "tensorflow")["dinov2"]
    pixels = clean_resize(images.float(), 224) / 255
    normal = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(folder).eval()(pixel_values=normal).pooler_output
    assert got.shape == (2, 32) and torch.allclose(got, wanted, atol=1e-5) and wanted.std() > 0.1
    assert torch.equal(got, extractor(images, "pytorch")["dinov2"])  # the protocol's resize is the Inception's
    assert len(extractor.identity()["dinov2_sha256"]) == 64


def test_evaluation_dinov2_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="wanted safetensors"):
        load_dinov2(tmp_path, "cpu")
    (tmp_path / "model.safetensors").write_text("broken")
    with pytest.raises(UserError, match="which cannot be loaded"):
        load_dinov2(tmp_path, "cpu")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layernorm" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="wanted all weights of a dinov2"):
        load_dinov2(tmp_path, "cpu")


def test_evaluation_without_dinov2(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="wanted a folder with config.json .* --dinov2 FOLDER"):
        load_dinov2(tmp_path / "missing", "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="transformers is not installed.*leave --dinov2 out") as caught:
        load_dinov2(tmp_path, "cpu")
    assert "\n" not in str(caught.value)
