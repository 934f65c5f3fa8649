"""Latents that people have already: every layout gives the rows it holds, and what lacks something is refused."""

import io
import json
import pickle
import time
import zipfile

import caches
import numpy as np
import pytest
import torch

from meanflow.data.cache import Cache
from meanflow.data.import_latents import ImportOptions, import_latents
from meanflow.errors import UserError

ROWS, SHAPE = 9, (4, 8, 8)
rng = np.random.default_rng(0)
MEAN = rng.normal(size=(ROWS, *SHAPE)).astype(np.float32)
STD = np.abs(rng.normal(size=(ROWS, *SHAPE))).astype(np.float32)
LABELS = rng.integers(0, 5, ROWS)
MOMENTS = np.concatenate([MEAN, STD], 1)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def official(path, moments=MOMENTS, **more):
    path.mkdir()
    for i, (x, label) in enumerate(zip(moments, LABELS, strict=True)):
        # channels last in memory, as the official code's permute leaves them
        image = torch.from_numpy(np.ascontiguousarray(x.transpose(1, 2, 0))).permute(2, 0, 1)
        torch.save({"image": image, "label": torch.tensor(label)} | more, path / f"{i:08d}.pt")
    return path


def archive(path, moments=MOMENTS, labels=True, zipped=True):
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(moments))]
    table = [[name, int(label)] for name, label in zip(names, LABELS, strict=True)]
    files = {name: npy(x) for name, x in zip(names, moments, strict=True)}
    files["dataset.json"] = json.dumps({"labels": table[::-1] if labels else None}).encode()
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def arrays(path):
    path.mkdir()
    for name, array in (("mean", MEAN), ("std", STD), ("labels", LABELS)):
        np.save(path / f"{name}.npy", array)
    return path


MAKERS = {
    "official": ("official", official),
    "repa zip": ("repa", archive),
    "repa folder": ("repa", lambda path: archive(path, zipped=False)),
    "edm2": ("edm2", archive),
    "arrays": ("arrays", arrays),
}


@pytest.mark.parametrize("layout, make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rows_are_those_of_the_files(tmp_path, layout, make, dtype):
    options = ImportOptions(layout=layout, dtype=dtype, shard_rows=4)
    manifest = import_latents(make(tmp_path / "old"), tmp_path / "new", options)
    assert manifest["pixels"] == ("unit" if layout == "edm2" else "symmetric")
    cache = Cache(tmp_path / "new")
    mean, std = cache.posterior(np.arange(ROWS))
    wanted = np.float16 if dtype == "fp16" else np.float32
    assert mean.dtype == wanted and (mean == MEAN.astype(wanted)).all() and (std == STD.astype(wanted)).all()
    assert (cache.labels == LABELS).all() and len(cache.manifest["shards"]) == 3


def test_imported_twice_is_resumed(tmp_path):
    options = ImportOptions(layout="repa", shard_rows=4)
    import_latents(archive(tmp_path / "old"), tmp_path / "new", options)
    before = caches.contents(tmp_path / "new")
    (tmp_path / "new" / "shard_00001.npy").unlink()
    import_latents(tmp_path / "old", tmp_path / "new", options)
    assert caches.contents(tmp_path / "new") == before


LOGVAR = np.concatenate([MEAN, 2 * np.log(STD)], 1)
BAD = {
    "log-variances": ("repa", lambda path: archive(path, LOGVAR), "with standard deviations down to -"),
    "means alone": ("repa", lambda path: archive(path, MEAN), "with standard deviations down to -"),
    "three channels": ("repa", lambda path: archive(path, MEAN[:, :3]), "wanted mean and std .* lack the posterior"),
    "no labels": ("repa", lambda path: archive(path, labels=False), "wanted .* with dataset.json"),
    "no zip": ("repa", lambda path: path.write_bytes(b"PK") and path, "whose labels cannot be read"),
    "other dict": ("official", lambda path: official_of(path, {"moments": 1}), "moments.*wanted a dict of image"),
    "no dict": ("official", lambda path: official_of(path, [1]), "got 'list', wanted a dict of image"),
    "code": ("official", lambda path: pickled(path), "cannot be read"),
    "nothing": ("official", lambda path: path.mkdir() or path, "which holds no latents"),
    "not there": ("arrays", lambda path: path, "wanted a folder or file that exists"),
    "no arrays": ("arrays", lambda path: path.mkdir() or path, "mean.npy, which cannot be read"),
    "not finite": ("repa", lambda path: archive(path, 1e6 * MOMENTS), "not finite in fp16"),
    "other size": ("repa", lambda path: archive(path, [*MOMENTS[:8], MOMENTS[8, :, :4, :4]]),
                   r"of \(4, 4, 4\), wanted"),
}  # fmt: skip


def official_of(path, sample):
    path.mkdir()
    torch.save(sample, path / "00000000.pt")
    return path


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('was run')",)


def pickled(path):
    path.mkdir()
    (path / "00000000.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    return path


@pytest.mark.parametrize("layout, make, words", BAD.values(), ids=BAD)
def test_bad_input(tmp_path, layout, make, words):
    with pytest.raises(UserError, match=words) as error:
        import_latents(make(tmp_path / "old"), tmp_path / "new", ImportOptions(layout=layout))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_one_header_is_parsed_at_a_time(tmp_path, monkeypatch):
    load, inside, most = np.load, [], []

    def slow(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", slow)
    source = archive(tmp_path / "latents.zip")
    import_latents(source, tmp_path / "cache", ImportOptions(layout="repa", workers=4))
    assert len(most) >= ROWS and max(most) == 1
