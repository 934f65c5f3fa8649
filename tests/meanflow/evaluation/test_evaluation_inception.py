"""The FID's Inception: the same features, FID and scores as torch-fidelity's for the same weights; files refused.

What torch-fidelity says is recorded in tests/data/fidelity, with the script that asked it.
"""

from pathlib import Path

import fid_inputs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from meanflow.errors import UserError
from meanflow.evaluation.features import Extractor
from meanflow.evaluation.frechet import Moments, frechet_distance
from meanflow.evaluation.inception import POOL3, SOURCE, SPATIAL, Inception, load_inception
from meanflow.evaluation.protocols import tensorflow_resize
from meanflow.evaluation.scores import inception_score, precision_recall

RECORD = Path(__file__).parents[2] / "data" / "fidelity" / "fidelity.npz"


@pytest.fixture(scope="module")
def weights():
    return fid_inputs.weights({name: tuple(x.shape) for name, x in Inception().state_dict().items()})


@pytest.fixture(scope="module")
def extractor(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(weights, path)
    return Extractor(path, "cpu")


@pytest.fixture(scope="module")
def record():
    with np.load(RECORD, allow_pickle=False) as arrays:
        return dict(arrays)


def features(extractor, images):
    return torch.cat([extractor(part, "tensorflow")["pool3"] for part in images.split(20)])


def compare(extractor, record, name, sizes):
    fake, real = features(extractor, fid_inputs.samples(sizes[0])), features(extractor, fid_inputs.references(sizes[1]))
    fid = frechet_distance(Moments.of(fake).gaussian(), Moments.of(real).gaussian())
    assert fid == pytest.approx(float(record[f"{name}_frechet_inception_distance"]), rel=1e-4)
    score = inception_score(extractor.probabilities(fake)).value
    assert score - 1 == pytest.approx(float(record[f"{name}_inception_score_mean"]) - 1, rel=1e-4)
    shares = [share.value for share in precision_recall(fake, real)]
    # torch-fidelity's precision and recall; one image at the edge of a sphere may fall on either side
    for share, key, count in zip(shares, ("precision", "recall"), sizes, strict=True):
        assert share == pytest.approx(float(record[f"{name}_{key}"]), abs=1.01 / count * (count > 100) + 1e-6)


def test_evaluation_features_are_torch_fidelitys(extractor, record):
    images = fid_inputs.samples(4)
    resized = tensorflow_resize(images[:1].float(), 299)[0, 0, :40]
    assert np.abs(resized.numpy() - record["resized"]).max() < 1e-3  # of 255
    got = extractor(images, "tensorflow")["pool3"]
    wanted = torch.from_numpy(record["features"])
    assert wanted.std(0).max() > 0.1  # the images differ in their features
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    logits = got @ extractor.inception.fc.weight.T
    assert (logits[:, :64] - torch.from_numpy(record["logits"])).abs().max() < 1e-4 * np.abs(record["logits"]).max()


def test_frechet_inception_distance_is_torch_fidelitys(extractor, record):
    compare(extractor, record, "small", fid_inputs.SMALL)


@pytest.mark.slow
def test_frechet_inception_distance_of_2000_images_is_torch_fidelitys(extractor, record):
    compare(extractor, record, "large", fid_inputs.LARGE)


def test_evaluation_spatial_features(extractor):
    """ADM's mixed_6/conv: the ReLU of Mixed_6d's 1x1 branch, seven channels, channels last."""
    seen = []
    hook = extractor.inception.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[-1]))
    got = extractor(fid_inputs.samples(2), "tensorflow")
    hook.remove()
    assert got["pool3"].shape == (2, POOL3) and got["spatial"].shape == (2, SPATIAL) == (2, 2023)
    assert torch.equal(got["spatial"].reshape(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))


def test_evaluation_repeats_its_bits_whatever_the_precision(extractor):
    images = fid_inputs.samples(2)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rough = extractor(images, "tensorflow")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, x in extractor(images, "tensorflow").items():
        assert torch.equal(x, rough[name])


class Malicious:
    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


def test_evaluation_weights_refused(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good.pth"
    torch.save(weights, good)
    net, digest = load_inception(good, "cpu")
    assert torch.equal(net.fc.weight, weights["fc.weight"]) and len(digest) == 64 and not net.training
    (tmp_path / "short.pth").write_bytes(good.read_bytes()[:100_000])
    torch.save({"fc.weight": Malicious()}, tmp_path / "code.pth")
    torch.save(weights | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "classes.pth")
    torch.save({k: v for k, v in weights.items() if not k.startswith("fc")}, tmp_path / "headless.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"half a download")
    for name in ("short.pth", "code.pth", "classes.pth", "headless.pth", "list.pth", "text.safetensors"):
        with pytest.raises(UserError, match="which is refused .* wanted tensors alone") as caught:
            load_inception(tmp_path / name, "cpu")
        assert "\n" not in str(caught.value) and SOURCE in str(caught.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="wanted 6726825d as its name says"):
        load_inception(tmp_path / "pt_inception-2015-12-05-6726825d.pth", "cpu")
    for missing in (None, tmp_path / "missing.pth"):
        with pytest.raises(UserError, match=f"fetch {SOURCE} and pass it by --inception FILE"):
            load_inception(missing, "cpu")
