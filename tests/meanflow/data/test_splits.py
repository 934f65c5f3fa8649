"""Classes, splits and shards of image sources; image sets of Hugging Face; FID folders."""

import io
import os

import pytest
from image_entries import BLUE, RED, left_out, names, picture, put, refusal, tar
from PIL import Image

from meanflow.data import entries
from meanflow.data.sources import decode, open_source
from meanflow.errors import UserError
from meanflow.evaluation.fid_reference import FolderImages

# --- classes and splits ---

CLASSES = {
    "train": (["bird/1.jpg", "train/1.jpg"], ["bird", "train"]),
    "train and test": (["bird/1.jpg", "test/1.jpg", "train/1.jpg"], ["bird", "test", "train"]),
    "val": (["bird/1.jpg", "val/1.jpg"], ["bird", "val"]),
    "a hidden split": (["bird/1.jpg", "fish/1.jpg", ".train/n1/1.jpg"], ["bird", "fish"]),
    "empty train": (["bird/1.jpg", "train/notes.txt"], ["bird", "train"]),
    "in the split": (["train/n1/1.jpg", "train/n2/1.jpg", "val/n1/1.jpg"], ["n1", "n2"]),
    "in the split beside others": (["train/n1/1.jpg", "val/1.jpg", "devkit/data/list.txt"], ["n1"]),
    "train in train": (["train/bird/1.jpg", "train/train/1.jpg", "val/train/1.jpg"], ["bird", "train"]),
}


@pytest.mark.parametrize("files, classes", CLASSES.values(), ids=CLASSES)
def test_classes_that_are_called_as_splits(tmp_path, files, classes):
    assert open_source(str(put(tmp_path, *files))).classes == classes


NO_SPLITS = {
    "other splits": (["train/n1/1.jpg", "val/n1/1.jpg"], "validation", "has the splits train, val"),
    "no train": (["val/n1/1.jpg", "test/n1/1.jpg"], "train", "has the splits test, val"),
    "no train, flat": (["val/1.jpg", "test/1.jpg"], "train", "has the splits test, val"),
    "another case": (["Train/n1/1.jpg", "Val/n1/1.jpg"], "train", "has the splits Train, Val"),
    "no splits": (["n1/1.jpg", "n2/1.jpg"], "validation", "no splits.*leave out --split"),
    "a class": (["val/1.jpg", "bird/1.jpg"], "val", "has the splits val"),
    "a class of classes": (["n1/1.jpg", "val/n1/1.jpg"], "train", "val looks like a split.*n1 like a class"),
    "train beside classes": (["n1/1.jpg", "train/n1/1.jpg"], "train", "train looks like a split.*n1 like a class"),
    "deeper classes": (["bird/2019/1.jpg", "train/2019/1.jpg"], "train", "train looks like a split.*bird like a"),
    "flat": (["train/1.jpg", "val/1.jpg"], "train", "holds no images; 1 entries .* an image in no class folder: 1.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("files, split, words", NO_SPLITS.values(), ids=NO_SPLITS)
def test_splits_that_do_not_exist_are_refused(tmp_path, files, split, words):
    with pytest.raises(UserError, match=words) as error:
        open_source(str(put(tmp_path / "set", *files)), split)
    assert "\n" not in str(error.value)


def test_a_split_may_lie_deeper(tmp_path, monkeypatch):
    put(tmp_path / "set", "CLS-LOC/train/n1/1.jpg", "CLS-LOC/val/n2/1.jpg")
    assert open_source(str(tmp_path / "set"), "CLS-LOC/val").classes == ["n2"]
    monkeypatch.chdir(tmp_path / "set" / "CLS-LOC" / "val")
    assert open_source(".", "val").classes == ["n2"]


def test_what_is_called_as_a_tar_file_but_is_none(tmp_path):
    put(tmp_path / "folders", "n1.tar/1.jpg", "n2.tar/1.jpg")
    assert open_source(str(tmp_path / "folders")).classes == ["n1.tar", "n2.tar"]
    tar(tmp_path / "tars" / "0.tar", "a.jpg", "a.cls")
    os.mkfifo(tmp_path / "tars" / "1.tar")  # opening it would wait for ever
    assert names(tmp_path / "tars") == ["0.tar:a"]
    (tmp_path / "tars" / "2.tar").symlink_to("gone.tar")
    assert "2.tar, which cannot be read (No such file or directory)" in refusal(tmp_path / "tars")


def test_no_split_takes_all_folders_as_classes(tmp_path):
    put(tmp_path / "folders", "bird/2019/1.jpg", "train/2019/1.jpg", "val/1.jpg")
    assert open_source(str(tmp_path / "folders"), "").classes == ["bird", "train", "val"]
    for name in ("train-0.tar", "val-0.tar"):
        tar(tmp_path / "tars" / name, "a.jpg", "a.cls")
    assert names(tmp_path / "tars", "") == ["train-0.tar:a", "val-0.tar:a"]


def test_the_folder_of_a_split_may_be_named_itself(tmp_path):
    put(tmp_path, "val/n1/1.jpg", "train/n1/1.jpg")
    for split in ("val", "validation", "train"):
        assert names(tmp_path / "val", split) == ["n1/1.jpg"]


SHARDS = {
    "two splits": (["x-train-0.tar", "x-val-0.tar"], "train", ["x-train-0.tar"]),
    "timm's": (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], "val", ["imagenet1k-validation-00.tar"]),
    "numbers beside": (["train0.tar", "train1.tar", "test0.tar"], "train", ["train0.tar", "train1.tar"]),
    "upper case": (["TRAIN_0.tar", "VAL_0.tar"], "validation", ["VAL_0.tar"]),
    "of no split": (["0.tar", "contest-1.tar"], "train", ["0.tar", "contest-1.tar"]),
    "of one split": (["train-0.tar", "more.tar"], "train", ["more.tar", "train-0.tar"]),
    "in the folder of a split": (["val/0.tar", "train/0.tar"], "val", ["0.tar"]),
}


@pytest.mark.parametrize("files, split, taken", SHARDS.values(), ids=SHARDS)
def test_shards_of_a_split(tmp_path, files, split, taken):
    for name in files:
        tar(tmp_path / name, "a.jpg", "a.cls")
    source = open_source(str(tmp_path), split)
    assert source.names == [f"{name}:a" for name in taken]
    beside = {name for name in files if "/" not in name} - set(taken)
    assert left_out(source) == dict.fromkeys(beside, "of another split")


NO_SHARDS = {
    "another": (["x-val-0.tar"], "train", "the split 'train' of tar files of validation, wanted one that is there"),
    "none": (["0.tar"], "val", "the split 'val' of tar files without splits"),
    "one without": (["train-0.tar", "val-0.tar", "more.tar"], "train", "and more.tar, wanted each tar file to tell"),
    "folders beside": (["0.tar", "n1/1.jpg"], "train", "tar files and the folder n1 with images"),
    "tar files below": (["0.tar", "more/1.tar"], "train", "tar files and the folder more with images"),
}


@pytest.mark.parametrize("files, split, words", NO_SHARDS.values(), ids=NO_SHARDS)
def test_shards_of_no_certain_split_are_refused(tmp_path, files, split, words):
    for name in files:
        tar(tmp_path / name, "a.jpg", "a.cls") if name.endswith(".tar") else put(tmp_path, name)
    with pytest.raises(UserError, match=words) as error:
        open_source(str(tmp_path), split)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    folder = put(tmp_path, "a/1.jpg", "b/1.jpg")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert "which cannot be read (Permission denied)" in refusal(folder)


# --- Hugging Face image sets ---


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="the optional package datasets is not installed")


def image_set(datasets, folder, labels=(0, 1), images=(RED, RED), split=None, **more):
    """Columns image and label, and more images by name; those of `more` stand first."""
    pictures = {"image": images, **{name: [BLUE, BLUE] for name in more}}
    columns = {name: [c and Image.new("RGB", (8, 8), c) for c in pictures[name]] for name in [*more, "image"]}
    names = datasets.ClassLabel(names=["x", "y", "z"])
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()) | {"label": names})
    datasets.Dataset.from_dict(columns | {"label": labels}, features, split=split).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("label", [None, -1], ids=["none", "unlabelled"])
def test_image_sets_without_labels_are_refused(datasets, tmp_path, label):
    assert f"label of train:1 = {label}, wanted a whole number" in refusal(image_set(datasets, tmp_path, (0, label)))


def test_rows_without_an_image_cannot_be_read(datasets, tmp_path):
    source = open_source(str(image_set(datasets, tmp_path, images=(RED, None))))
    assert source.labels.tolist() == [0, 1] and source.entries.count == 2
    with pytest.raises(ValueError, match="no image in this row"):
        source.read(1)


def test_columns_of_image_sets(datasets, tmp_path):
    source = open_source(str(image_set(datasets, tmp_path / "mask", mask=None)))
    assert decode(source.read(0))[0].getpixel((3, 3)) == RED
    renamed = datasets.load_from_disk(str(tmp_path / "mask")).rename_column("image", "photo")
    renamed.save_to_disk(str(tmp_path / "photo"))
    assert "'photo'" in refusal(tmp_path / "photo") and "'mask'" in refusal(tmp_path / "photo")
    renamed.remove_columns("mask").save_to_disk(str(tmp_path / "one"))
    assert decode(open_source(str(tmp_path / "one")).read(0))[0].getpixel((3, 3)) == RED
    renamed.remove_columns("label").save_to_disk(str(tmp_path / "none"))
    assert "one column of type" in refusal(tmp_path / "none")


def test_splits_of_image_sets(datasets, tmp_path):
    image_set(datasets, tmp_path / "val", split="validation")
    assert "split: got 'train', wanted validation" in refusal(tmp_path / "val")
    assert names(tmp_path / "val", "val") == ["val:0", "val:1"]
    image_set(datasets, tmp_path / "none")
    assert "split: got 'test', wanted train" in refusal(tmp_path / "none", "test")
    both = datasets.DatasetDict({name: datasets.load_from_disk(str(tmp_path / "none")) for name in ("train", "test")})
    both.save_to_disk(str(tmp_path / "both"))
    assert names(tmp_path / "both", "test") == ["test:0", "test:1"]
    assert "cannot be loaded" in refusal(tmp_path / "both", "validation")


# --- FID folders ---


def test_fid_folders_follow_the_same_rules(tmp_path):
    put(tmp_path, "1.PNG", "a/2.jpg", "a/3.TIF", data=picture(format="PNG"))
    put(tmp_path, "notes.txt", "._1.png", ".thumbnails/1.png", "2.png.part")
    (tmp_path / "folder.png").mkdir()
    images = FolderImages(tmp_path)
    assert images.names == ["1.PNG", "a/2.jpg", "a/3.TIF"] and images.read([0, 1, 2]).shape == (3, 3, 40, 40)
    assert images.entries.count == 7 and set(left_out(images)) == {"notes.txt", "._1.png", ".thumbnails", "2.png.part"}


def test_fid_images_keep_their_order(tmp_path):
    put(tmp_path, "a-b/1.png", "a/1.png", "a.png")
    assert FolderImages(tmp_path).names == [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.png"))]


def test_reasons_are_the_same_on_every_machine():
    error = OSError(2, "No such file or directory", "/home/somebody/images/1.jpg")
    assert entries.reason(error) == "No such file or directory"
    text = entries.reason(ValueError(f"no {io.BytesIO()} of '/tmp/x/1.jpg': 3/4 read"))
    assert text == "no <_io.BytesIO object> of 'a path': 3/4 read"
    assert entries.reason(KeyError(hex(id(error)))) == "''"
    assert entries.reason(MemoryError()) == "MemoryError"
    assert "\n" not in entries.reason(ValueError("a\nb\x1b"))
    assert len(entries.reason(ValueError("x" * 10**6))) <= 200
