"""Images to latents: what diffusers encodes of the same crops, bit for bit, however often killed, in any processes."""

import io
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import caches
import fid_inputs
import numpy as np
import pytest
import torch
from fresh import ROOT, environment, run_forked
from image_entries import tar
from PIL import Image
from safetensors.torch import load_file, save_file

from meanflow.config import DataConfig
from meanflow.data import preparation, vae
from meanflow.data.cache import Cache, verify
from meanflow.data.decoder import make_decoder
from meanflow.data.preparation import Options, prepare
from meanflow.data.sources import ClassFolders, centre_crop, open_source
from meanflow.errors import UserError
from meanflow.evaluation.features import Extractor, ImageStatistics
from meanflow.evaluation.frechet import read_statistics
from meanflow.evaluation.inception import Inception

BATCH, SHARD_ROWS = 3, 7
COMMAND = [str(ROOT / "scripts" / "prepare_data.py"), "encode"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes of these tests have: oneDNN may sum in another order with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return caches.image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return caches.tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def options(vae_folder):
    return Options(
        image_size=caches.SIZE, vae=str(vae_folder), dtype="fp32", flipped=True, batch=BATCH, shard_rows=SHARD_ROWS,
        workers=2, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, images, options):
    folder = tmp_path_factory.mktemp("made") / "latents"
    prepare(str(images), folder, options)
    return folder


# --- the numbers ---


def test_encodings_are_diffusers_own(made, images, vae_folder):
    from diffusers import AutoencoderKL

    # as ours is, frozen and not mapped: torch may choose another convolution, of other last bits, for weights that can
    # learn or lie elsewhere
    encoder = AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False).requires_grad_(False)
    files = sorted(images.glob("*/*"))
    crops = np.stack([np.asarray(centre_crop(Image.open(path).convert("RGB"), caches.SIZE)) for path in files])
    x = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    cache = Cache(made)
    assert len(cache) == len(files) == 20
    for start in range(0, len(files), SHARD_ROWS):
        for rows in torch.arange(start, min(start + SHARD_ROWS, len(files))).split(BATCH):
            for mirrored in (False, True):
                with torch.no_grad():
                    wanted = encoder.encode(x[rows].flip(-1) if mirrored else x[rows]).latent_dist
                mean, std = cache.posterior(rows.numpy(), np.full(len(rows), mirrored))
                assert (mean == wanted.mean.numpy()).all() and (std == wanted.std.numpy()).all()
    classes = sorted(path.name for path in images.iterdir())
    assert cache.labels.tolist() == [classes.index(path.parent.name) for path in files]
    manifest = cache.manifest
    assert manifest["classes"] == classes and manifest["converted"] == {"CMYK": 2, "L": 8, "RGBA": 2}
    assert (manifest["crop"], manifest["image_size"]) == ("adm centre crop", caches.SIZE)


def test_fp16_is_the_fp32_rounded(made, images, options, tmp_path):
    prepare(str(images), tmp_path / "half", replace(options, dtype="fp16", flipped=False))
    half, whole = Cache(tmp_path / "half"), Cache(made)
    rows = np.arange(len(whole))
    assert half.dtype == np.float16 and not half.flipped
    for a, b in zip(half.posterior(rows), whole.posterior(rows), strict=True):
        assert (a == b.astype(np.float16)).all()


def test_latents_of_another_size(images, options, tmp_path):
    wide = replace(options, image_size=2 * caches.SIZE, limit=4)
    manifest = prepare(str(images), tmp_path / "wide", wide)
    assert manifest["latent_shape"] == [4, 16, 16] and manifest["rows"] == 4
    # evenly spread, not the first class alone
    assert Cache(tmp_path / "wide").labels.tolist() == [0, 0, 1, 2]


def test_reference_statistics_of_the_same_crops(images, options, tmp_path):
    weights = tmp_path / "inception.safetensors"
    save_file(fid_inputs.weights({name: tuple(x.shape) for name, x in Inception().state_dict().items()}), weights)
    few = replace(options, limit=5)

    def statistics(path):
        return lambda device: ImageStatistics(Extractor(path, device))

    prepare(str(images), tmp_path / "latents", few, statistics(weights))
    written = read_statistics(tmp_path / "latents" / "reference.npz")["pool3"]
    folder = ClassFolders(images)
    files = [folder.read(i) for i in (0, 4, 8, 12, 16)]
    crops = [np.asarray(centre_crop(Image.open(io.BytesIO(f)).convert("RGB"), caches.SIZE)) for f in files]
    features = Extractor(weights, "cpu")(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), "tensorflow")["pool3"]
    assert torch.allclose(written.mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(written.covariance, features.double().T.cov(), rtol=1e-4, atol=1e-6)
    # what is there is kept, and the latents do not depend on it
    before = caches.contents(tmp_path / "latents")
    prepare(str(images), tmp_path / "latents", few, statistics(weights))
    assert caches.contents(tmp_path / "latents") == before
    with pytest.raises(UserError, match="inception: got .*, wanted the weights of the FID's network"):
        prepare(str(images), tmp_path / "other", few, statistics(tmp_path / "none.pth"))
    assert not (tmp_path / "other").exists()


# --- killed and resumed, several processes ---


def interrupted(at, original):
    """The original until its call number `at`, which is interrupted."""
    calls = iter(range(at + 1))

    def call(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    return call


MOMENTS = {"in the first batch": ("encode", 0), "in the third shard": ("encode", 7), "in a shard's write": ("put", 1)}


@pytest.mark.parametrize("stage, at", MOMENTS.values(), ids=MOMENTS)
def test_resume_after_an_interrupt_is_bit_equal(made, images, options, tmp_path, monkeypatch, stage, at):
    owner, name = {"encode": (preparation.Encoder, "__call__"), "put": (preparation.Builder, "put")}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted(at, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            prepare(str(images), tmp_path / "latents", options)
    whole = len(list((tmp_path / "latents").glob("shard_*.json")))
    encoded = []
    original = preparation.Encoder.__call__
    monkeypatch.setattr(preparation.Encoder, "__call__", lambda self, x: encoded.append(len(x)) or original(self, x))
    prepare(str(images), tmp_path / "latents", replace(options, workers=1))
    assert caches.contents(tmp_path / "latents") == caches.contents(made)
    assert sum(encoded) == 20 - whole * SHARD_ROWS  # nothing that was whole is encoded again


def arguments(images, out, options):
    values = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in
              ("image_size", "vae", "dtype", "batch", "shard_rows", "device")]  # fmt: skip
    return [str(images), "--out", str(out), *values, "--flipped"]


def killed(nth, command):
    """A program that runs the command and is killed by SIGKILL when it is to rename its nth file."""
    return f"""
import os, runpy, signal, sys
count, rename = iter(range(10 ** 6)), os.replace
def replace(*args):
    if "latents" in str(args[0]) and next(count) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.replace = replace
sys.argv = {command!r}
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# files in order: job, then latents, labels and entry of each of three shards, then the manifest
@pytest.mark.parametrize("nth", [pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 3, 6, 10)] + [5])
def test_resume_after_kill_9_is_bit_equal(made, images, options, tmp_path, nth):
    out = tmp_path / "latents"
    first = run_forked(killed(nth, [*COMMAND, *arguments(images, out, options)]))
    assert first.returncode == -9, first.stderr
    assert list(out.glob("*.partial")) and not (out / "manifest.json").exists()
    prepare(str(images), out, options)
    assert caches.contents(out) == caches.contents(made)


def share(rank, images, out, options) -> int:
    """Prepare, as one of several processes: how many images this one encodes."""
    encoded, original = [], preparation.Encoder.__call__

    def encode(self, x):
        encoded.append(len(x))
        return original(self, x)

    with mock.patch.object(preparation.Encoder, "__call__", encode):
        prepare(str(images), out, options)
    return sum(encoded)


def test_two_ranks_write_what_one_writes(ranks, made, images, options, tmp_path):
    # rank 0 has shards 0 and 2
    assert ranks(share, images, tmp_path / "latents", options) == [13, 7]
    assert caches.contents(tmp_path / "latents") == caches.contents(made)


@pytest.mark.slow
def test_two_ranks_of_the_command_write_what_one_writes(made, images, options, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *COMMAND, *arguments(images, tmp_path / "latents", options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 13 images" in done.stdout + done.stderr  # rank 0 has shards 0 and 2
    assert caches.contents(tmp_path / "latents") == caches.contents(made)


def test_fault_flipped_bit_is_repaired(made, images, options, tmp_path):
    out = tmp_path / "latents"
    prepare(str(images), out, options)
    shard = out / "shard_00001.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    prepare(str(images), out, options)
    assert verify(out)  # sizes do not tell
    prepare(str(images), out, replace(options, repair=True))
    assert caches.contents(out) == caches.contents(made)


# --- sources ---


def test_tar_files_hold_what_the_folder_holds(made, images, options, tmp_path):
    folder = ClassFolders(images)
    for part in range(2):
        files = {}
        for i in range(part * 10, part * 10 + 10):
            files[f"{i:04d}.cls"] = str(folder.labels[i]).encode()
            files[f"{i:04d}.{folder.names[i].rpartition('.')[2].lower()}"] = folder.read(i)
        tar(tmp_path / f"train-{part}.tar", *files.items())
    prepare(str(tmp_path), tmp_path / "latents", options)
    ours, theirs = Cache(tmp_path / "latents"), Cache(made)
    rows = np.arange(20)
    assert (ours.posterior(rows)[0] == theirs.posterior(rows)[0]).all() and (ours.labels == theirs.labels).all()


def test_a_split_is_taken_where_there_is_one(images, tmp_path):
    (tmp_path / "val").symlink_to(images)
    assert open_source(str(tmp_path), "val").names == open_source(str(images), "train").names


def test_hugging_face_image_set(images, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
    folder = ClassFolders(images)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=folder.classes)})
    rows = {"image": [str(images / name) for name in folder.names], "label": folder.labels.tolist()}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"))
    assert source.classes == folder.classes and (source.labels == folder.labels).all()
    assert [source.read(i) for i in range(20)] == [folder.read(i) for i in range(20)]
    with pytest.raises(UserError, match="split test, which cannot be loaded"):
        open_source(str(tmp_path / "set"), "test")


# --- bad input ---


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def damaged_folder(path):
    """Four images of which two cannot be read."""
    image = caches.pictures()[10][1]
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        (path / name / "good.jpg").write_bytes(caches.jpeg(image))
    (path / "a" / "cut.jpg").write_bytes(caches.jpeg(image)[:-300])
    (path / "b" / "text.jpg").write_text("no image")
    return path


def test_unreadable_images_are_fatal_or_listed(options, tmp_path):
    source = str(damaged_folder(tmp_path / "images"))
    with pytest.raises(UserError, match="got a/cut.jpg, which cannot be read .*truncated.*--bad-images skip") as error:
        prepare(source, tmp_path / "latents", options)
    one_line(error)
    manifest = prepare(source, tmp_path / "latents", replace(options, bad_images="skip"))
    assert manifest["rows"] == 2 and Cache(tmp_path / "latents").labels.tolist() == [0, 1]
    assert [name for name, _ in manifest["skipped"]] == ["a/cut.jpg", "b/text.jpg"]
    assert "truncated" in manifest["skipped"][0][1] and "cannot identify" in manifest["skipped"][1][1]


NO_IMAGES = {
    "not there": (lambda path: None, "which is not there, wanted class folders"),
    "empty": (lambda path: path.mkdir(), "which holds no images, wanted class folders"),
    "text alone": (lambda path: (path / "a").mkdir(parents=True) or (path / "a" / "b.txt").touch(), "holds no images"),
    "no tar": (lambda path: path.write_bytes(b"x" * 1024), "wanted a plain tar file"),
    "compressed": (lambda path: tar(path, ("a.jpg", b""), ("a.cls", b"1"), mode="w:gz"), "wanted a plain tar file"),
    "no label": (lambda path: tar(path, ("a/b.jpg", b"")), "got a/b of .* without a label"),
    "no number": (lambda path: tar(path, ("b.jpg", b""), ("b.cls", b"cat")), "b.cls of .* = b'cat', wanted a whole"),
}


@pytest.mark.parametrize("make, words", NO_IMAGES.values(), ids=NO_IMAGES)
def test_no_images(options, tmp_path, make, words):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=words) as error:
        prepare(str(tmp_path / "images"), tmp_path / "latents", options)
    one_line(error)
    assert not (tmp_path / "latents").exists()


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="the package datasets is not here .*pip install datasets"):
        open_source("hub:org/name")


def broken_weights(path):
    weights = caches.tiny_vae(path) / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def lacking_weights(path):
    weights = caches.tiny_vae(path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, weights)


def infinite_weights(path):
    weights = caches.tiny_vae(path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["quant_conv.bias"].fill_(1e5)
    save_file(tensors, weights)


VAES = {
    "not there": (lambda path: None, {}, "which cannot be loaded .*wanted a diffusers AutoencoderKL"),
    "cut short": (broken_weights, {}, "which cannot be loaded"),
    "weights missing": (lacking_weights, {}, "it lacks the weights .'encoder.conv_in.bias'"),
    "four colours": (lambda path: caches.tiny_vae(path, in_channels=4), {}, "vae: got 4, wanted one of 3 colours"),
    "odd size": (caches.tiny_vae, {"image_size": 17}, "image_size: got 17, wanted a multiple of 2"),
    "overflow": (infinite_weights, {"dtype": "fp16"}, "got latents of a_flower/014.JPEG that are not finite in fp16"),
}  # fmt: skip


@pytest.mark.parametrize("make, more, words", VAES.values(), ids=VAES)
def test_wrong_vae(images, options, tmp_path, make, more, words):
    make(tmp_path / "vae")
    with pytest.raises(UserError, match=words) as error:
        prepare(str(images), tmp_path / "latents", replace(options, vae=str(tmp_path / "vae"), **more))
    one_line(error)


def test_samples_are_decoded_by_the_latents_own_vae(made, vae_folder, tmp_path):
    latents = torch.randn(2, *caches.SHAPE)
    config = DataConfig(path=str(made), vae=str(vae_folder))
    images = make_decoder(config, torch.device("cpu"))(latents)
    assert images.shape == (2, 3, caches.SIZE, caches.SIZE)
    unit = make_decoder(replace(config, pixels="unit"), torch.device("cpu"))(latents)
    assert torch.equal(unit, 2 * images - 1)
    other = str(caches.tiny_vae(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="data.vae: got .*other.*wanted the autoencoder of the latents") as error:
        make_decoder(replace(config, vae=other), torch.device("cpu"))
    one_line(error)
    make_decoder(replace(config, vae=other, path=str(tmp_path)), torch.device("cpu"))  # the latents are elsewhere


def test_a_folder_of_other_images(made, options, tmp_path):
    with pytest.raises(UserError, match="wanted .* was begun with; repeat that command, or name another folder"):
        prepare(str(damaged_folder(tmp_path / "images")), made, options)
    assert vae.identity("a", vae.load_vae(options.vae, torch.device("cpu"), "vae"))["sha256"]
