"""Fashion-MNIST from its idx files, which are made here, small; nothing is downloaded."""

import gzip
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from meanflow.apps import page
from meanflow.config import DataConfig
from meanflow.data.dataset import FASHION_CLASSES, open_dataset, open_pictures
from meanflow.errors import UserError
from meanflow.evaluation import classifier
from meanflow.evaluation.classifier import ClassifierJudge
from meanflow.presets import preset
from meanflow.training.trainer import train

COUNTS = {"train": 40, "t10k": 20}


def idx(array: np.ndarray) -> bytes:
    """The bytes of an idx file."""
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def written(folder: Path, pack=lambda data: data, ending: str = "") -> Path:
    """A folder of the four files: noise, brighter by the class, the classes in turn."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 50, (count, 28, 28), dtype=np.uint8) + 20 * labels[:, None, None]
        for name, array in {"images-idx3": images, "labels-idx1": labels}.items():
            (folder / f"{part}-{name}-ubyte{ending}").write_bytes(pack(idx(array)))
    return folder


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "fashion")


def opened(folder: Path):
    return open_pictures(DataConfig(name="fashion", path=str(folder)))


def test_images_are_padded_and_scaled(folder):
    split = opened(folder)
    assert (len(split.train), len(split.real)) == (40, 20)
    assert split.learned is split.train and split.held_out is split.real
    raw = (folder / "train-images-idx3-ubyte").read_bytes()[16:]
    pixels = np.frombuffer(raw, np.uint8).reshape(-1, 28, 28)
    images = split.train.images
    assert images.shape == (40, 1, 32, 32) and images.dtype == torch.float32
    assert np.abs(images[:, 0, 2:-2, 2:-2].numpy() - (pixels / 127.5 - 1)).max() < 1e-6
    border = torch.ones(32, 32, dtype=bool)
    border[2:-2, 2:-2] = False
    assert (images[:, 0, border] == -1).all()
    rows = np.array([7, 3])
    batch = open_dataset(DataConfig(name="fashion", path=str(folder)), preset("fashion").model).read(rows)
    assert torch.equal(batch.mean, images[rows]) and batch.labels.tolist() == [7, 3] and batch.std is None
    assert split.train.classes[9] == "Ankle boot" and len(FASHION_CLASSES) == 10


def test_packed_files_are_the_same(folder, tmp_path):
    plain, packed = opened(folder), opened(written(tmp_path / "packed", gzip.compress, ".gz"))
    for a, b in zip(plain, packed, strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FAULTS = {  # (file, its bytes turned into others, the line)
    "another magic": (IMAGES, lambda x: b"\0\0\x0d\3" + x[4:], "first bytes: got '00000d03', wanted 00000803, an idx"),
    "labels for images": (IMAGES, lambda x: idx(np.zeros(40, np.uint8)), "got '00000801', wanted 00000803"),
    "an empty file": (LABELS, lambda x: b"", "first bytes: got '', wanted 00000801"),
    "half a header": (IMAGES, lambda x: x[:10], "bytes: got 10, wanted a header of 16"),
    "truncated": (IMAGES, lambda x: x[:-1], "bytes: got 31375, wanted 31376 for its sizes (40, 28, 28)"),
    "too long": (LABELS, lambda x: x + b"\0", "bytes: got 29, wanted 28 for its sizes (20,)"),
    "another size": (IMAGES, lambda x: idx(np.zeros((40, 32, 32), np.uint8)), "size: got (32, 32), wanted images of"),
    "no images": (IMAGES, lambda x: idx(np.zeros((0, 28, 28), np.uint8)), "images: got 0, wanted one or more"),
    "a label too few": (LABELS, lambda x: idx(np.zeros(19, np.uint8)), "labels: got 19, wanted 20, one for each image"),
    "a label out of range": (LABELS, lambda x: x[:-1] + b"\x0a", "labels: got 10, wanted labels from 0 to 9"),
}


@pytest.mark.parametrize("name, damage, line", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_line(folder, name, damage, line):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        opened(folder)
    message = str(error.value)
    assert message.startswith(str(path)) and line in message and "; " in message and "\n" not in message


def flipped(data: bytes) -> bytes:
    """Packed, with another checksum."""
    packed = gzip.compress(data)
    return packed[:-8] + bytes((packed[-8] ^ 1,)) + packed[-7:]


PACKED_FAULTS = {
    "truncated": (lambda x: gzip.compress(x)[:-20], "Compressed file ended before"),
    "not packed": (lambda x: x, "Not a gzipped file"),
    "a bit flipped": (flipped, "CRC check failed"),
}


@pytest.mark.parametrize("pack, line", PACKED_FAULTS.values(), ids=PACKED_FAULTS)
def test_a_fault_of_packing_is_one_line(tmp_path, pack, line):
    with pytest.raises(UserError) as error:
        opened(written(tmp_path / "packed", pack, ".gz"))
    message = str(error.value)
    assert f"train-images-idx3-ubyte.gz: got a file that cannot be read ({line}" in message and "\n" not in message


def test_a_missing_folder_says_where_to_get_it(command, tmp_path):
    code, _, err = command("train", "fashion", "--data.path", tmp_path / "none", "--out", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert f"data.path: got '{tmp_path / 'none'}', wanted a folder of Fashion-MNIST's four idx files" in err
    assert "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; apt-get install dataset-fashion-mnist" in err
    assert "github.com/zalandoresearch/fashion-mnist" in err and "--data.path FOLDER" in err


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, and a classifier that learns quickly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "CLASSIFIER_EPOCHS", {"fashion": 2})
    return tmp_path / "cache" / "meanflow" / "judges"


def test_two_steps_are_trained_sampled_and_judged(command, folder, cache, tmp_path):
    config, run = runs.tiny("fashion", steps=2, sample_every=2), tmp_path / "run"
    config = replace(config, data=replace(config.data, path=str(folder)))
    assert train(replace(config, evaluation=replace(config.evaluation, every=2)), run) == 0
    assert command("sample", run, "--count", 4, "--out", tmp_path / "four")[0] == 0
    assert np.load(tmp_path / "four.npz")["images"].shape == (4, 32, 32, 1)
    studio = page.load(run, torch.device("cpu"), torch.float32)
    assert Image.open(BytesIO(studio.draw(studio.read("classes=Sneaker&each=2&steps=1")).png)).width > 64
    code, out, err = command("evaluate", run)
    assert code == 0 and {"accuracy", "frechet", "frechet_floor", "variance_ratio"} <= set(out.split()), err
    assert len(list(cache.iterdir())) == 1  # that of the training's judge too
    # where the run has been taken to another machine
    folder.rename(tmp_path / "elsewhere")
    code, _, err = command("evaluate", run)
    assert code == 2 and "data.path: got" in err and err.count("\n") == 1
    assert command("evaluate", run, "--data", tmp_path / "elsewhere")[1] == out


def test_one_process_trains_the_classifier_and_the_others_wait(folder, cache, monkeypatch):
    trained, data = [], DataConfig(name="fashion", path=str(folder))
    monkeypatch.setattr(ClassifierJudge, "_train", lambda *args: (trained.append(1), time.sleep(0.5)))
    # each thread opens the lock for itself, as a process does
    makers = [threading.Thread(target=ClassifierJudge, args=(data,)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(trained) == 1 and [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_a_classifier_is_kept(folder, cache, monkeypatch):
    data = DataConfig(name="fashion", path=str(folder))
    first = ClassifierJudge(data)
    assert first.score(first.real.images, first.real.labels).frechet < 1e-6
    (kept,) = cache.iterdir()
    monkeypatch.setattr(ClassifierJudge, "_train", lambda *args: pytest.fail("trained again"))
    again = ClassifierJudge(data)
    assert torch.equal(first.real_features, again.real_features) and first.accuracy_real == again.accuracy_real
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    monkeypatch.setattr(classifier, "CLASSIFIER_EPOCHS", {"fashion": 2})
    content = kept.read_bytes()
    kept.write_bytes(content[:1000])  # damaged: made anew, the same
    ClassifierJudge(data)
    assert kept.read_bytes() == content
    ClassifierJudge(data, seed=1)  # another's is beside it
    assert len(list(cache.iterdir())) == 2
