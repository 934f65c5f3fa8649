"""The latent cache: what is written is read again, and whatever is damaged is named."""

import hashlib
import json
import os
import shutil

import caches
import numpy as np
import pytest
import torch

from meanflow.config import DataConfig, ModelConfig
from meanflow.data.cache import Builder, Cache, verify
from meanflow.data.dataset import Latents, open_dataset
from meanflow.draws import Draws
from meanflow.errors import UserError
from meanflow.training.draw import draw_latents

ROWS, SHAPE = 23, (4, 8, 8)
rng = np.random.default_rng(0)
MEAN = rng.normal(size=(ROWS, *SHAPE)).astype(np.float16)
STD = np.abs(rng.normal(size=(ROWS, *SHAPE))).astype(np.float16)
LABELS = rng.integers(0, 5, ROWS)
JOB = {"count": ROWS, "shard_rows": 5, "latent_shape": SHAPE, "dtype": "fp16", "flipped": True, "classes": None}
JOB |= {"pixels": "symmetric", "vae": {"name": "none", "sha256": None}, "source": {"kind": "test", "path": "here"}}


def build(folder, shards=None, job=JOB):
    """A cache of two copies, of which the second negates the first's mean."""
    builder = Builder(folder, job)
    builder.begin()
    for shard in builder.missing() if shards is None else shards:
        part = list(builder.members(shard))
        first = np.stack([MEAN[part], STD[part]], 1)
        second = np.stack([-MEAN[part], STD[part]], 1)
        builder.put(shard, np.stack([first, second], 1), LABELS[part], [], {})
    return builder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    build(folder).finish()
    return folder


@pytest.fixture
def cache(made, tmp_path):
    shutil.copytree(made, tmp_path / "latents")
    return tmp_path / "latents"


def test_rows_are_read_again(made):
    cache = Cache(made)
    assert (len(cache), cache.shape, cache.flipped) == (ROWS, SHAPE, True)
    indices = np.array([22, 0, 4, 5, 19, 5, 20])
    mean, std = cache.posterior(indices)
    assert mean.dtype == np.float16 and (mean == MEAN[indices]).all() and (std == STD[indices]).all()
    assert (cache.labels == LABELS).all()
    mirrored = indices % 2 == 1
    mean, _ = cache.posterior(indices, mirrored)
    assert (mean == np.where(mirrored[:, None, None, None], -1, 1) * MEAN[indices]).all()


def test_any_library_reads_a_shard(made):
    shard = np.load(made / "shard_00004.npy", mmap_mode="r", allow_pickle=False)
    assert shard.shape == (3, 2, 2, *SHAPE) and (shard[1, 0, 0] == MEAN[21]).all() and (shard[1, 0, 1] == STD[21]).all()


def test_mirrored_copies_are_read_or_the_device_mirrors(made, tmp_path):
    indices, flip = np.arange(4), torch.tensor([True, False, True, False])
    draws = Draws(0, 0, torch.arange(4))
    batch = Latents(str(made), 5).read(indices, flip)
    assert batch.flip is None and batch.mean.dtype == torch.float16
    assert (batch.mean.numpy() == np.where(flip[:, None, None, None], -1, 1) * MEAN[:4]).all()
    single = Latents(str(caches.cache_of(tmp_path, MEAN, STD, LABELS)), 5)
    batch = single.read(indices, flip)
    x = draw_latents(batch, draws, DataConfig(sample_posterior=False, scale=1.0)).numpy()
    assert x.dtype == np.float32 and (x[1] == MEAN[1]).all() and (x[0] == MEAN[0, :, :, ::-1]).all()
    assert single.read(indices).flip is None


def test_of_another_size_than_the_model(made):
    model = ModelConfig(1, 16, 2, 2, input_size=16, num_classes=5)
    with pytest.raises(UserError, match=r"data: got \(4, 8, 8\), wanted samples of the model's shape \(4, 16, 16\)"):
        open_dataset(DataConfig(path=str(made)), model)


def test_pixels_must_be_those_of_the_run(made):
    with pytest.raises(UserError, match="data.pixels: got 'unit', wanted 'symmetric', the latents'"):
        Latents(str(made), 5, "unit")


def test_named_classes_are_counted(tmp_path):
    build(tmp_path / "latents", job=JOB | {"classes": list("abcdefg")}).finish()
    model = ModelConfig(1, 16, 2, 2, input_size=8, num_classes=6)
    with pytest.raises(UserError, match="model.num_classes: got 6, wanted the data's 7"):
        open_dataset(DataConfig(path=str(tmp_path / "latents")), model)


def test_a_shard_of_no_rows(tmp_path):
    builder = build(tmp_path / "latents", shards=[0, 2, 3, 4])
    builder.put(1, np.zeros((0, 2, 2, *SHAPE)), np.zeros(0), [["x.jpg", "cut short"]] * 5, {})
    assert builder.finish()["skipped"] == [["x.jpg", "cut short"]] * 5
    cache = Cache(tmp_path / "latents")
    assert len(cache) == ROWS - 5 and (cache.posterior(np.array([5]))[0] == MEAN[10]).all()
    assert verify(tmp_path / "latents") == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path, place=-100):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def remove(path):
    path.unlink()


DAMAGE = {  # name: what happens to which file, what verify says, whether opening sees it
    "truncated shard": (truncate, "shard_00002.npy", "shard 2: shard_00002.npy has 10367 bytes instead of 10368", True),
    "missing shard": (remove, "shard_00004.npy", "shard 4: shard_00004.npy is missing", True),
    "flipped bit": (flip_bit, "shard_00003.npy", "shard 3: shard_00003.npy does not match its SHA-256", False),
    "truncated labels": (truncate, "labels_00001.npy", "shard 1: labels_00001.npy has 167 bytes instead of 168", True),
    "flipped bit of a label": (lambda path: flip_bit(path, -8), "labels_00000.npy",
                               "shard 0: labels_00000.npy does not match its SHA-256", False),
}  # fmt: skip


@pytest.mark.parametrize("damage, name, words, seen", DAMAGE.values(), ids=DAMAGE)
def test_fault_damaged_shard_is_named_and_repaired(cache, made, damage, name, words, seen):
    damage(cache / name)
    assert verify(cache) == [words]
    if seen:
        with pytest.raises(UserError) as error:
            Cache(cache)
        assert name in str(error.value) and "repeat the command" in str(error.value) and "\n" not in str(error.value)
    builder = Builder(cache, JOB)
    builder.begin()
    missing = builder.missing(read=True)
    assert missing == [int(words.split()[1][:-1])] and builder.missing() == missing * seen
    build(cache, missing).finish()
    assert caches.contents(cache) == caches.contents(made)


def test_fault_every_bad_shard_is_named(cache):
    flip_bit(cache / "shard_00000.npy")
    truncate(cache / "shard_00001.npy")
    remove(cache / "labels_00001.npy")
    problems = verify(cache)
    assert [p.split(":")[0] for p in problems] == ["shard 0", "shard 1"] and "labels_00001.npy is missing" in problems[
        1
    ]


MANIFESTS = {
    "missing manifest": (remove, "has no manifest.json", "its preparation has not ended"),
    "truncated manifest": (lambda path: path.write_bytes(path.read_bytes()[:50]), "manifest.json", "cannot be read"),
    "flipped bit in the manifest": (
        lambda path: path.write_text(path.read_text().replace('"rows": 5', '"rows": 4', 1)),
        "manifest.json",
        "does not match its checksum",
    ),
    "other format": (lambda path: path.write_text("[]"), "manifest.json", "no JSON object"),
}


@pytest.mark.parametrize("damage, name, words", MANIFESTS.values(), ids=MANIFESTS)
def test_fault_manifest(cache, damage, name, words):
    damage(cache / "manifest.json")
    for read in (Cache, verify):
        with pytest.raises(UserError) as error:
            read(cache)
        assert name in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_is_no_cache(tmp_path):
    with pytest.raises(UserError, match="prepare it by scripts/prepare_data.py"):
        Cache(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="out: got .*which holds thesis.tex, wanted an empty or new folder"):
        Builder(tmp_path, JOB).begin()


def test_another_job_is_refused(cache):
    with pytest.raises(UserError, match="dtype: got 'fp32', wanted 'fp16' as .* was begun with"):
        Builder(cache, JOB | {"dtype": "fp32"}).begin()
    # the same images somewhere else are the same job
    builder = Builder(cache, JOB | {"source": {"kind": "test", "path": "there"}})
    builder.begin()
    assert builder.job["source"]["path"] == "here"


def test_one_command_at_a_time(cache):
    first, second = Builder(cache, JOB), Builder(cache, JOB)
    (cache / "shard_00000.npy.partial").touch()
    with first.alone():
        assert not list(cache.glob("*.partial"))
        with pytest.raises(UserError, match="which another process is writing to"), second.alone():
            pass
    with second.alone():
        pass


@pytest.mark.parametrize("moment", ["begin", "flush", "rename"])
@pytest.mark.parametrize("nth", [0, 3, 7])
def test_fault_disk_full_or_killed_while_writing(tmp_path, made, monkeypatch, moment, nth):
    class Full(OSError):
        pass

    calls = []

    def fail_at(original):
        def call(*args):
            calls.append(args)
            if len(calls) == nth + 1:
                raise Full(28, "No space left on device")
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        # a file's hash is begun when nothing is written, fsync when all is, replace when it is on the disk
        module, name = {"begin": (hashlib, "sha256"), "flush": (os, "fsync"), "rename": (os, "replace")}[moment]
        patch.setattr(module, name, fail_at(getattr(module, name)))
        with pytest.raises(Full):
            build(tmp_path / "latents").finish()
    folder = tmp_path / "latents"
    assert not (folder / "manifest.json").exists()
    whole = {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix != ".partial"}
    wanted = caches.contents(made)
    assert all(wanted[name] == data for name, data in whole.items())  # whole or absent
    begun = sum(name.startswith("shard") and name.endswith("json") for name in whole)
    builder = Builder(folder, JOB)
    builder.begin()
    assert len(builder.missing()) == builder.shards - begun  # what is whole is not made again
    build(folder).finish()
    assert caches.contents(folder) == wanted


def test_manifest_is_plain_json(made):
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["rows"] == ROWS and [s["rows"] for s in manifest["shards"]] == [5, 5, 5, 5, 3]
