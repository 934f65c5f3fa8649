"""Messy copies of image sets: each entry is used, left out by name and reason, or refused in one line, by one rule."""

import os

import caches
import pytest
from image_entries import FORK, left_out, names, put, refusal, tar

from meanflow.data import entries
from meanflow.data.preparation import Options, prepare
from meanflow.data.sources import open_source
from meanflow.errors import UserError
from meanflow.evaluation.fid_reference import FolderImages

# --- hidden, and of the system ---

LEFTOVERS = {
    ".git": ".git/1.jpg", ".ipynb_checkpoints": "a/.ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX": "__MACOSX/a/1.jpg",
    "fork": "a/._1.jpg", ".DS_Store": "a/.DS_Store", "Thumbs.db": "a/Thumbs.db", "@eaDir": "a/@eaDir/1.jpg",
    "upper case": "__MacOSX/1.jpg", "lost+found": "lost+found/1.jpg",
}  # fmt: skip


@pytest.mark.parametrize("name", LEFTOVERS.values(), ids=LEFTOVERS)
def test_leftovers_are_neither_data_nor_classes(tmp_path, name):
    put(tmp_path / "folders", "a/1.jpg", "b/1.jpg", name)
    source = open_source(str(tmp_path / "folders"))
    assert (source.classes, source.names, source.labels.tolist()) == (["a", "b"], ["a/1.jpg", "b/1.jpg"], [0, 1])
    hidden = next(iter(left_out(source)))
    assert name.startswith(hidden) and left_out(source)[hidden] == entries.HIDDEN
    labels = [name.replace(".jpg", ".cls")] if name.endswith(".jpg") else []
    tar(tmp_path / "tars" / "0.tar", name, *labels, "a.jpg", "a.cls")
    put(tmp_path / "tars", "._0.tar", data=FORK)
    source = open_source(str(tmp_path / "tars"))
    assert source.names == ["0.tar:a"] and left_out(source)["0.tar:" + name] == entries.HIDDEN
    reference = FolderImages(tmp_path / "folders")
    assert reference.names == ["a/1.jpg", "b/1.jpg"] and left_out(reference)[hidden] == entries.HIDDEN


def test_a_hidden_folder_without_images_moves_no_label(tmp_path):
    put(tmp_path, "a/1.jpg", "b/1.jpg")
    for name in (".cache", "__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    assert open_source(str(tmp_path)).classes == ["a", "b"]


def test_a_source_may_lie_in_a_hidden_folder(tmp_path):
    put(tmp_path / ".cache" / "images", "a/1.jpg")
    tar(tmp_path / ".cache" / "tars" / "0.tar", "a.jpg", "a.cls")
    assert names(tmp_path / ".cache" / "images") == ["a/1.jpg"]
    assert names(tmp_path / ".cache" / "tars") == ["0.tar:a"]
    assert len(FolderImages(tmp_path / ".cache" / "images")) == 1


# --- the account ---


def test_every_entry_is_accounted_for(tmp_path, capsys):
    folder = put(tmp_path / "images", "a/1.jpg", "a/2.PNG", "a/notes.txt", "a/3.gif", "b/.x/1.jpg", "c/1.jpg", "d.jpg")
    put(folder, "README", "c/broken.jpg", data=b"no image")
    (folder / "empty").mkdir()
    os.mkfifo(folder / "a" / "pipe.jpg")
    options = Options(image_size=16, vae=str(caches.tiny_vae(tmp_path / "vae")), device="cpu", bad_images="skip")
    manifest = prepare(str(folder), tmp_path / "latents", options)
    account = manifest["entries"]
    assert (account["count"], account["used"], account["left_out"], account["refused"]) == (10, 3, 7, 0)
    assert {why: those["names"] for why, those in account["reasons"].items()} == {
        "hidden, or of the system": ["b/.x"],
        "no data by its ending": ["README", "a/3.gif", "a/notes.txt"],
        "an image in no class folder": ["d.jpg"],
        "no regular file": ["a/pipe.jpg"],
        "cannot be read": ["c/broken.jpg"],
    }
    assert manifest["classes"] == ["a", "b", "c", "empty"]
    said = capsys.readouterr().out
    assert "10 entries: 4 used, 6 left out, 0 refused" in said
    assert "4 classes: a, b, c, empty; 2 of them without an image: b, empty" in said
    assert "left out 3, no data by its ending: README, a/3.gif, a/notes.txt" in said
    limited = prepare(str(folder), tmp_path / "few", Options(**vars(options) | {"limit": 2}))["entries"]
    assert (limited["count"], limited["used"]) == (10, 2) and limited["reasons"][entries.UNCHOSEN]["count"] == 2


def test_refused_entries_are_counted(tmp_path):
    text = refusal(tar(tmp_path / "0.tar", "a.jpg", "b.jpg", "c.jpg", "c.cls", "d.txt", "e.cls"))
    assert "got a of" in text and "3 of 5 entries are refused" in text
    text = refusal(tar(tmp_path / "1.tar", "a.jpg", "a.JPG", "a.cls", "b.jpg", "b.cls"))
    assert "2 of 3 entries are refused" in text


def test_the_summary_names_the_classes():
    assert entries.describe_classes([0, 2, 2], None) == "3 classes: 0, 1, 2; 1 of them without an image: 1"
    assert entries.describe_classes([5], ["x"] * 6).startswith("6 classes: x, x, x, x, x, x; 5 of them without")
    huge = entries.describe_classes([2**31 - 1], None)
    absent = "0, 1, 2, 3, 4, 5, 6, 7, ..."
    assert huge == f"{2**31} classes: 0, 1, 2, 3, ..., {2**31 - 1}; {2**31 - 1} of them without an image: {absent}"


def test_long_lists_are_counted_and_cut():
    account = entries.Entries()
    for i in range(2 * entries.NAMED):
        account.leave_out(str(i), entries.NO_DATA)
    account.close(1)
    assert account.count == 2 * entries.NAMED + 1 and len(account.left_out()[entries.NO_DATA]["names"]) == entries.NAMED


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x1b[2J.jpg", "a\udcff.jpg"], ids=["line", "escape", "no UTF-8"])
def test_odd_names_stay_one_line(tmp_path, name):
    folder = tmp_path / "images"
    put(folder, f"c/{name}", data=b"no image")
    options = Options(image_size=16, vae=str(caches.tiny_vae(tmp_path / "vae")), device="cpu")
    with pytest.raises(UserError, match="which cannot be read") as error:
        prepare(str(folder), tmp_path / "latents", options)
    assert str(error.value).isprintable()
    assert refusal(tar(tmp_path / "0.tar", name)).isprintable()
