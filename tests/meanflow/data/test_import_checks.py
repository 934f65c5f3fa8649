"""What one layout of `import` refuses the others refuse; what is stored in another way is converted and said."""

import io
import json
import zipfile

import caches
import numpy as np
import pytest
import torch

from meanflow.data import cache as caching
from meanflow.data.cache import Cache, read_manifest, verify
from meanflow.data.import_latents import ImportOptions, import_latents
from meanflow.errors import UserError

ROWS, SHAPE = 3, (4, 8, 8)
rng = np.random.default_rng(0)
MEAN = rng.normal(size=(ROWS, *SHAPE)).astype(np.float32)
STD = (np.abs(rng.normal(size=(ROWS, *SHAPE))) + 1e-3).astype(np.float32)
LABELS = [2, 0, 4]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def official(path, mean, std, labels):
    path.mkdir()
    for i, label in enumerate(labels):
        image = np.concatenate([mean[i], std[i]])
        image = image.astype(image.dtype.newbyteorder("="))  # torch has no other
        image = torch.from_numpy(image) if image.dtype.kind in "fiuc" else image.tolist()
        label = torch.from_numpy(label) if isinstance(label, np.ndarray) else label
        torch.save({"image": image, "label": label}, path / f"{i:08d}.pt")
    return path


def repa(path, mean, std, labels, zipped=True):
    def plain(label):
        return label.tolist() if isinstance(label, np.ndarray) else label

    files = {f"00000/{i}.npy": npy(np.concatenate([mean[i], std[i]])) for i in range(len(labels))}
    table = [[name, plain(label)] for name, label in zip(files, labels, strict=True)]
    files["dataset.json"] = json.dumps({"labels": table}).encode()
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
    for name, data in files.items() if not zipped else ():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def arrays(path, mean, std, labels):
    path.mkdir()
    np.save(path / "mean.npy", mean)
    np.save(path / "std.npy", std)
    np.save(path / "labels.npy", np.array([label if label is not None else np.nan for label in labels]))
    return path


LAYOUTS = {
    "official": ("official", official),
    "repa zip": ("repa", repa),
    "repa folder": ("repa", lambda *args: repa(*args, zipped=False)),
    "edm2": ("edm2", repa),
    "arrays": ("arrays", arrays),
}
every_layout = pytest.mark.parametrize("layout, make", LAYOUTS.values(), ids=LAYOUTS)


def refused(tmp_path, layout, source):
    with pytest.raises(UserError) as error:
        import_latents(source, tmp_path / "new", ImportOptions(layout=layout))
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert not (tmp_path / "new" / "manifest.json").exists()
    return str(error.value)


def one_bad(x, value):
    """The last number of the last row is another."""
    x = x.copy()
    x[-1, -1, -1, -1] = value
    return x


VALUES = {
    "log-variances": (MEAN, 2 * np.log(STD), "with standard deviations down to -"),
    "negative": (MEAN, -STD, "with standard deviations down to -"),
    "one negative": (MEAN, one_bad(STD, -1e-3), "with standard deviations down to -0.001"),
    "NaN as std": (MEAN, one_bad(STD, np.nan), "which is not finite"),
    "NaN as mean": (one_bad(MEAN, np.nan), STD, "which is not finite"),
    "infinite": (MEAN, one_bad(STD, np.inf), "which is not finite"),
    "whole numbers": (MEAN.astype(np.int8), STD.astype(np.int8), "floating-point numbers"),
    "complex": (MEAN.astype(np.complex64), STD.astype(np.complex64), "floating-point numbers"),
    "not square": (MEAN[..., :7], STD[..., :7], r"\(2C, S, S\)"),
    "not a picture": (MEAN[..., 0], STD[..., 0], r"S, S\)"),
}  # fmt: skip


@every_layout
@pytest.mark.parametrize("mean, std, words", VALUES.values(), ids=VALUES)
def test_values_that_every_layout_refuses(tmp_path, layout, make, mean, std, words):
    source = make(tmp_path / "old", mean, std, LABELS)
    with pytest.raises(UserError, match=words) as error:
        import_latents(source, tmp_path / "new", ImportOptions(layout=layout))
    assert str(error.value).isprintable() and not (tmp_path / "new" / "manifest.json").exists()


BAD_LABELS = {
    "below 0": -1,
    "a fraction": 1.7,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "nothing": None,
    "too large": 2**40,
    "a truth": True,
}


@every_layout
@pytest.mark.parametrize("label", BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_every_layout_refuses(tmp_path, layout, make, label):
    labels = [True] * ROWS if label is True else [2, label, 4]  # numpy takes one truth for a 1
    text = refused(tmp_path, layout, make(tmp_path / "old", MEAN, STD, labels))
    assert "the label of" in text and "wanted a whole number from 0 on" in text


@every_layout
@pytest.mark.parametrize(
    "labels", [["cat", "dog", "cat"], ["1.5", "0", "2"], ["", "0", "2"]], ids=["names", "1.5", "none"]
)
def test_names_as_labels_are_refused(tmp_path, layout, make, labels):
    assert "wanted a whole number from 0 on" in refused(tmp_path, layout, make(tmp_path / "old", MEAN, STD, labels))


VECTORS = {
    "soft": [0.5, 0.5, 0, 0, 0],
    "two hot": [1, 0, 1, 0, 0],
    "none hot": [0, 0, 0, 0, 0],
    "hot by 2": [0, 2, 0, 0, 0],
    "minus": [0, 1, -1, 0, 0],
}


@every_layout
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_vectors_that_are_not_one_hot_are_refused(tmp_path, layout, make, vector):
    labels = np.eye(5)[LABELS]
    labels[1] = vector
    assert "wanted a whole number" in refused(tmp_path, layout, make(tmp_path / "old", MEAN, STD, list(labels)))


CERTAIN = {
    "one-hot": (list(np.eye(5)[LABELS]), "one-hot labels"),
    "one-hot whole numbers": (list(np.eye(5, dtype=np.int64)[LABELS]), "one-hot labels"),
    "floats": ([2.0, 0.0, 4.0], "labels stored as floats"),
    "vectors of one": (list(np.array(LABELS)[:, None]), None),
    "digits": (["2", "0", "04"], None),
}


@every_layout
@pytest.mark.parametrize("labels, said", CERTAIN.values(), ids=CERTAIN)
def test_labels_of_certain_meaning_are_converted(tmp_path, layout, make, labels, said):
    manifest = import_latents(make(tmp_path / "old", MEAN, STD, labels), tmp_path / "new", ImportOptions(layout=layout))
    assert Cache(tmp_path / "new").labels.tolist() == LABELS
    assert manifest["converted"] == ({said: ROWS} if said else {})
    assert manifest["entries"]["used"] == manifest["entries"]["count"] == ROWS


@every_layout
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"], ids=str)
def test_other_floats_are_taken_over(tmp_path, layout, make, dtype):
    import_latents(
        make(tmp_path / "old", MEAN.astype(dtype), STD.astype(dtype), LABELS), tmp_path / "new",
        ImportOptions(layout=layout, dtype="fp32"),
    )  # fmt: skip
    mean, std = Cache(tmp_path / "new").posterior(np.arange(ROWS))
    assert (mean == MEAN.astype(dtype)).all() and (std == STD.astype(dtype)).all()


# --- tensors ---

TENSORS = {
    "bf16": (lambda x: x.bfloat16(), "latents stored in bfloat16"),
    "requires_grad": (lambda x: x.clone().requires_grad_(), None),
    "parameter": (lambda x: torch.nn.Parameter(x.clone()), None),
    "a view": (lambda x: torch.cat([x, x])[8:], None),
    "float64": (lambda x: x.double(), None),
}


@pytest.mark.parametrize("change, said", TENSORS.values(), ids=TENSORS)
def test_tensors_are_taken_over_exactly(tmp_path, change, said):
    (tmp_path / "old").mkdir()
    image = change(torch.from_numpy(np.concatenate([MEAN[0], STD[0]])))
    torch.save({"image": image, "label": torch.tensor(3.0).bfloat16()}, tmp_path / "old" / "0.pt")
    options = ImportOptions(layout="official", dtype="fp32")
    manifest = import_latents(tmp_path / "old", tmp_path / "new", options)
    mean, std = Cache(tmp_path / "new").posterior(np.arange(1))
    assert (np.concatenate([mean[0], std[0]]) == image.detach().float().numpy()).all()
    assert manifest["converted"] == {"labels stored as floats": 1} | ({said: 1} if said else {})


NO_TENSORS = {
    "a list": ([1.0, 2.0], 1),
    "a sparse one": (torch.eye(8)[None].expand(8, 8, 8).to_sparse(), 1),
    "a meta one": (torch.empty(8, 8, 8, device="meta"), 1),
    "endless": (torch.zeros(1, 1, 1).expand(8, 10**6, 10**6), 1),
    "endless in bf16": (torch.zeros(1, 1, 1).bfloat16().expand(8, 10**6, 10**6), 1),
    "no image": (None, 1),
    "a dict as label": (torch.ones(8, 8, 8), {"a": 1}),
    "a ragged label": (torch.ones(8, 8, 8), [[1], [1, 2]]),
}


@pytest.mark.parametrize("image, label", NO_TENSORS.values(), ids=NO_TENSORS)
def test_what_is_no_latent_is_refused(tmp_path, image, label):
    (tmp_path / "old").mkdir()
    torch.save({"image": image, "label": label}, tmp_path / "old" / "0.pt")
    assert "0.pt" in refused(tmp_path, "official", tmp_path / "old")


# --- files and lists ---


def listed(path, table, files):
    with zipfile.ZipFile(path, "w") as file:
        for name in files:
            file.writestr(name, npy(np.concatenate([MEAN[0], STD[0]])))
        file.writestr("dataset.json", json.dumps({"labels": table}))
    return path


LISTS = {
    "shorter": ([["0.npy", 1]], ["0.npy", "1.npy"], "got 1.npy of .* without a label in dataset.json"),
    "longer": ([["0.npy", 1], ["1.npy", 1]], ["0.npy"], "got 1.npy in dataset.json .* which is not there"),
    "twice": ([["0.npy", 1], ["0.npy", 2]], ["0.npy"], "got 2 labels of 1 files"),
    "of other names": ([["a/0.npy", 1]], ["0.npy"], "2 of 2 entries are refused"),
    "of pairs alone": ([["0.npy"]], ["0.npy"], "whose labels cannot be read"),
    "of a mapping": ({"0.npy": 1}, ["0.npy"], "whose labels cannot be read"),
    "out of the folder": ([["../0.npy", 1]], ["0.npy"], "got 0.npy of .* without a label"),
}


@pytest.mark.parametrize("table, files, words", LISTS.values(), ids=LISTS)
def test_lists_that_do_not_fit_the_files_are_refused(tmp_path, table, files, words):
    listed(tmp_path / "old.zip", table, files)
    with pytest.raises(UserError, match=words) as error:
        import_latents(tmp_path / "old.zip", tmp_path / "new", ImportOptions(layout="repa"))
    assert str(error.value).isprintable() and not (tmp_path / "new").exists()


def test_leftovers_beside_latents_are_left_out(tmp_path):
    leftovers = ["__MACOSX/._0.npy", "._dataset.json", "notes.txt", ".x/0.npy"]
    source = listed(tmp_path / "old.zip", [["0.npy", 1]], ["0.npy", *leftovers])
    account = import_latents(source, tmp_path / "zip", ImportOptions(layout="repa"))["entries"]
    assert (account["count"], account["used"], account["left_out"]) == (5, 1, 4)
    folder = repa(tmp_path / "folder", MEAN, STD, LABELS, zipped=False)
    folder.joinpath(".DS_Store").touch()
    account = import_latents(folder, tmp_path / "two", ImportOptions(layout="repa"))["entries"]
    assert (account["count"], account["used"], account["reasons"]["hidden, or of the system"]["names"]) == (
        4, 3, [".DS_Store"],
    )  # fmt: skip
    folder = official(tmp_path / "official", MEAN, STD, LABELS)
    (folder / "._00000000.pt").write_bytes(b"\0\5\26\7")
    (folder / "00000002.pt").rename(folder / "00000002.PT")
    account = import_latents(folder, tmp_path / "three", ImportOptions(layout="official"))["entries"]
    assert (account["count"], account["used"]) == (4, 3)
    official(folder / "val", MEAN, STD, LABELS)
    assert "in a folder of its own" in refused(tmp_path, "official", folder)


def test_files_of_another_kind_are_refused(tmp_path):
    arrays(tmp_path / "old", MEAN, STD, LABELS)
    for name, change in {
        "an archive": lambda file: np.savez(file, MEAN),
        "objects": lambda file: np.save(file, np.array([object()]), allow_pickle=True),
        "names": lambda file: np.save(file, np.array(["a"])),
        "nothing": lambda file: None,
        "a huge shape": lambda file: file.write(npy(MEAN).replace(b"(3, 4, 8, 8)", b"(9999999,8,)")),
    }.items():
        with (tmp_path / "old" / "mean.npy").open("wb") as file:
            change(file)
        assert "mean" in refused(tmp_path, "arrays", tmp_path / "old"), name


def test_an_encrypted_or_damaged_zip_is_refused(tmp_path):
    whole = listed(tmp_path / "old.zip", [["0.npy", 1]], ["0.npy"]).read_bytes()
    for name, data in {
        "encrypted": whole.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"),
        "damaged": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "cut": whole[:-30],
        "another packing": whole.replace(b"PK\1\2\x14\3\x14\0\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x55\0"),
    }.items():
        (tmp_path / "old.zip").write_bytes(data)
        assert data != whole, name
        refused(tmp_path, "repa", tmp_path / "old.zip")


# --- caches that were written before ---


def aged(folder):
    """As it was written before entries, EXIF and alpha were in it."""
    manifest = read_manifest(folder)
    for name in ("entries", "exif", "alpha"):
        manifest.pop(name, None)
    caching._write_json(folder / "manifest.json", manifest | {"checksum": caching._checksum(manifest)})
    job = json.loads((folder / "job.json").read_text())
    caching._write_json(folder / "job.json", {k: v for k, v in job.items() if k not in ("exif", "alpha")})
    return folder


def test_old_caches_load_and_go_on(tmp_path, command):
    from meanflow.data.preparation import Options, prepare

    images = caches.image_folder(tmp_path / "images")
    vae = str(caches.tiny_vae(tmp_path / "vae"))
    options = Options(image_size=16, vae=vae, device="cpu", shard_rows=7)
    prepare(str(images), tmp_path / "new", options)
    wanted = caches.contents(tmp_path / "new")
    aged(tmp_path / "new")
    assert len(Cache(tmp_path / "new")) == 20 and not verify(tmp_path / "new")
    assert command("prepare_data", "verify", tmp_path / "new")[0] == 0
    (tmp_path / "new" / "shard_00001.npy").unlink()
    prepare(str(images), tmp_path / "new", options)
    found = caches.contents(tmp_path / "new")
    assert {k: v for k, v in found.items() if k[0] in "sl"} == {k: v for k, v in wanted.items() if k[0] in "sl"}
    assert read_manifest(tmp_path / "new")["entries"]["used"] == 20
    old = aged(caches.cache_of(tmp_path / "arrays", MEAN, STD, np.array(LABELS)))
    code, out, _ = command("prepare_data", "import", tmp_path / "arrays", "--layout", "arrays", "--out", old)
    assert (
        code == 0 and "3 entries: 3 used" in out and "5 classes: 0, 1, 2, 3, 4; 2 of them without an image: 1, 3" in out
    )


DAMAGED_ENTRIES = {
    "no object": "[]", "deep": "[" * 10**5, "rows": '"rows": 7', "file": '"file": "labels_00000.npy"',
    "skipped": '"skipped": [1]', "converted": '"converted": {"L": "x"}',
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED_ENTRIES.values(), ids=DAMAGED_ENTRIES)
def test_a_damaged_entry_of_a_shard_is_made_anew(tmp_path, text):
    old = caches.cache_of(tmp_path, MEAN, STD, np.array(LABELS))
    wanted = caches.contents(old)
    path = old / "shard_00000.json"
    entry = json.loads(path.read_text())
    if text[0] == '"':
        changed = json.loads("{" + text + "}")
        (entry["latents"] if "file" in changed else entry).update(changed)
        text = json.dumps(entry)
    path.write_text(text)
    caches.cache_of(tmp_path, MEAN, STD, np.array(LABELS))
    assert caches.contents(old) == wanted
