"""Each named protocol changes one thing; what the choices do to pixels and labels."""

import numpy as np
import pytest
import torch
from PIL import Image

from meanflow.draws import Draws
from meanflow.errors import UserError
from meanflow.evaluation.protocols import (
    CHANGES,
    OFFICIAL,
    RESIZES,
    clean_resize,
    inception_input,
    labels_of,
    named,
    pytorch_resize,
    quantize,
    tensorflow_resize,
)

AXES = ("reference", "labels", "rounding", "resize", "splits")


def test_official_protocol():
    assert named("official") == OFFICIAL
    wanted = {"reference": "adm", "labels": "uniform", "rounding": "truncate", "resize": "tensorflow"}
    wanted["splits"] = "ordered"
    assert OFFICIAL.describe() == wanted and set(wanted) == set(AXES)


def test_protocols_of_improved_meanflow():
    """Both official codes ask for each class equally often and shuffle the Inception Score's splits."""
    shared = {"labels": "balanced", "splits": "shuffled", "resize": "tensorflow"}
    assert named("imf-jax").describe() == shared | {"reference": "imf", "rounding": "truncate"}
    assert named("imf-torch").describe() == shared | {"reference": "jit", "rounding": "round"}
    others = {"reference": "adm", "labels": "balanced", "rounding": "floor"}
    assert named("imf-adm").describe() == OFFICIAL.describe() | others


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "official" and "imf-" not in name])
def test_protocol_changes_one_thing(name):
    ours, official = named(name).describe(), OFFICIAL.describe()
    assert [axis for axis in AXES if ours[axis] != official[axis]] == list(CHANGES[name])
    assert len(CHANGES[name]) == 1


def test_protocols_join():
    joined = named("balanced+own-data").describe()
    assert joined == OFFICIAL.describe() | {"labels": "balanced", "reference": "data"}
    with pytest.raises(UserError, match="protocols: got 'offical', wanted names among official balanced"):
        named("offical")
    with pytest.raises(UserError, match="wanted one choice of rounding"):
        named("round+floor")


def test_protocol_labels():
    indices = torch.arange(5000)
    uniform = labels_of("uniform", Draws(3, 0, indices), 10)
    balanced = labels_of("balanced", Draws(3, 0, indices), 10)
    assert torch.equal(balanced.bincount(), torch.full((10,), 500))
    counts = uniform.bincount(minlength=10).double()
    assert counts.std() > 5 and (counts - 500).abs().max() < 5 * 450**0.5  # binomial, not even
    assert torch.equal(labels_of("uniform", Draws(3, 0, indices[77:99]), 10), uniform[77:99])
    assert not torch.equal(labels_of("uniform", Draws(4, 0, indices), 10), uniform)


def test_protocol_rounding():
    x = torch.tensor([-2, -1, -0.999, 0, 0.5, 0.996, 1, 2.0])
    level = 127.5 * (x.double().clamp(-1, 1) + 1)
    assert torch.equal(quantize(x, "truncate"), (level + 0.5).clamp(max=255).floor().to(torch.uint8))
    assert torch.equal(quantize(x, "floor"), level.floor().to(torch.uint8))
    assert torch.equal(quantize(x, "round"), level.round().to(torch.uint8))
    # the official formula rounds to the nearest level, and ties upward
    dense = torch.linspace(-1, 1, 100_001)
    official, nearest, lower = (quantize(dense, r).int() for r in ("truncate", "round", "floor"))
    assert (official != nearest).sum() <= 255 and (official - nearest).abs().max() <= 1
    assert 0.49 < (official - lower).double().mean() < 0.51
    for level in range(256):  # what was uint8 comes back by all of them
        x = torch.tensor([level / 127.5 - 1], dtype=torch.float64)
        assert [int(quantize(x, r)) for r in ("truncate", "round")] == [level] * 2


@pytest.mark.parametrize("height, width, size", [(8, 8, 19), (5, 9, 4), (12, 12, 12), (32, 32, 299)])
def test_protocol_resizes_by_hand(height, width, size):
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 255

    def bilinear(image, y, x):
        (y, x), (h, w) = (max(y, 0.0), max(x, 0.0)), image.shape
        y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
        bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
        return top * (1 - (y - y0)) + bottom * (y - y0)

    scale_y, scale_x = height / size, width / size
    places = [(i, j) for i in range(size) for j in range(size)][:: max(1, size * size // 97)]
    corners, centres = tensorflow_resize(x, size), pytorch_resize(x, size)
    assert corners.shape == centres.shape == (2, 3, size, size)
    for i, j in places:
        assert float(corners[1, 2, i, j]) == pytest.approx(float(bilinear(x[1, 2], i * scale_y, j * scale_x)))
        wanted = bilinear(x[1, 2], (i + 0.5) * scale_y - 0.5, (j + 0.5) * scale_x - 0.5)
        assert float(centres[1, 2, i, j]) == pytest.approx(float(wanted))


@pytest.mark.parametrize("size", [19, 299])
def test_protocol_clean_resize_is_pillows(size):
    x = torch.randint(256, (2, 3, 40, 33), generator=torch.Generator().manual_seed(0)).float()
    got = clean_resize(x, size)
    planes = [Image.fromarray(p.numpy()).resize((size, size), Image.Resampling.BICUBIC) for p in x.flatten(0, 1)]
    wanted = torch.from_numpy(np.stack([np.array(p) for p in planes])).clamp(0, 255).unflatten(0, (2, 3))
    assert (got - wanted).abs().max() < 2e-3  # of 255
    assert size < 40 or (got.min() == 0 and got.max() == 255)  # what overshoots is clipped


def test_protocol_inception_input():
    black, white = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    for resize in RESIZES:
        low, high = (-1, 1) if resize == "pytorch" else (-1, 127 / 128)
        for images, wanted in ((black, low), (white, high)):
            assert (inception_input(images, resize) - wanted).abs().max() < 1e-6
        grey = inception_input(white[:, :1], resize)
        assert grey.shape == (1, 3, 299, 299) and grey.dtype == torch.float32
    with pytest.raises(UserError, match="quantize them first"):
        inception_input(white.float(), "tensorflow")
