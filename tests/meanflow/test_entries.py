"""Messy copies of image sets: each entry is used, left out by name and reason, or refused in one line, by one rule."""

import io
import os
import tarfile

import caches
import pytest
from PIL import Image

from meanflow import entries
from meanflow.errors import UserError
from meanflow.preparation import Options, prepare
from meanflow.reference import FolderImages
from meanflow.sources import decode, open_source

RED, BLUE = (200, 0, 0), (0, 0, 200)
FORK = b"\0\5\26\7" + bytes(60)  # what macOS stores beside a file


def picture(colour=RED, format="JPEG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (40, 40), colour).save(file, format)
    return file.getvalue()


def put(folder, *names, data=picture()):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar(path, *members):
    """Members: a name, of an image or of the label 1, or a pair of a name and bytes, or of (type, link's name)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for member in members:
            name, data = member if isinstance(member, tuple) else (member, None)
            data = (b"1" if name.lower().endswith(".cls") else picture()) if data is None else data
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                data = b""
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def names(path, split="train"):
    return open_source(str(path), split).names


def left_out(source):
    return {name: why for why, those in source.entries.left_out().items() for name in those["names"]}


def refusal(path, split="train"):
    with pytest.raises(UserError) as error:
        open_source(str(path), split)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    assert huge == f"{2**31} classes: 0, 1, 2, 3, ..., {2**31 - 1}; {2**31 - 1} of them without an image: " + (
        "0, 1, 2, 3, 4, 5, 6, 7, ..."
    )


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


# --- endings, keys and labels in tar files ---

TARS = {
    "dots": (["22.05.jpg", "22.05.cls", "22.06.jpg", "22.06.cls"], ["22.05", "22.06"]),
    "dots and more": (["1.5.jpg", "1.5.seg.png", "1.5.cls"], ["1.5.jpg"]),
    "dots in the folder": (["v1.0/a.jpg", "v1.0/a.cls", "v1.0/b.c.jpg", "v1.0/b.c.cls"], ["v1.0/a", "v1.0/b.c"]),
    "upper case": (["IMG_1.JPG", "IMG_1.CLS"], ["IMG_1"]),
    "mixed case": (["a.Jpeg", "a.cLs", "b.PNG", "b.cls"], ["a", "b"]),
    "the label first": (["a.cls", "a.jpg"], ["a"]),
    "a leading dot": (["./a.jpg", "a.cls", "./d/b.jpg", "./d/b.cls"], ["./a", "./d/b"]),
    "a mask first": (["a.seg.png", "a.jpg", "a.cls"], ["a.jpg"]),
    "a mask last": (["a.jpg", "a.mask.PNG", "a.cls"], ["a.jpg"]),
    "an ending of two parts": (["a.img.jpg", "a.cls"], ["a"]),
    "two labelled": (["a.jpg", "a.cls", "a.crop.jpg", "a.crop.cls"], ["a", "a.crop"]),
    "other members": (["a.jpg", "a.json", "a.cls", "index"], ["a"]),
}


@pytest.mark.parametrize("members, keys", TARS.values(), ids=TARS)
def test_keys_of_tar_files(tmp_path, members, keys):
    images = [(name, picture(BLUE if name.count(".") > 1 and "." in name[:-5] else RED)) for name in members
              if not name.lower().endswith((".cls", ".json", "index"))]  # fmt: skip
    source = open_source(str(tar(tmp_path / "0.tar", *images, *(set(members) - {name for name, _ in images}))))
    assert source.names == [f"0.tar:{key}" for key in keys] and set(source.labels.tolist()) == {1}
    assert source.entries.count == len(members) - len(keys)  # a label belongs to its image
    if members[0] in ("a.seg.png", "a.jpg"):
        assert decode(source.read(0))[0].getpixel((5, 5))[0] > 150


def test_of_one_name_the_last_counts(tmp_path):
    path = tar(tmp_path / "0.tar", ("a.jpg", picture(BLUE)), ("a.cls", b"7"), "a.jpg", "a.cls")
    source = open_source(str(path))
    assert source.labels.tolist() == [1] and source.read(0) == picture()
    assert source.entries.left_out()["replaced by a later member of its name"]["count"] == 2


REFUSED_TARS = {
    "two images": (["a.jpg", "a.png", "a.cls"], "a.jpg and a.png of .*2 images of one key"),
    "two of another case": (["a.jpg", "a.JPG", "a.cls"], "a.jpg and a.JPG of"),
    "two parts each": (["a.left.jpg", "a.right.jpg", "a.cls"], "a.left.jpg and a.right.jpg of"),
    "two labels": (["a.jpg", "a.cls", "a.CLS"], "a.cls and a.CLS, 2 labels"),
    "no label": (["a.jpg", "a.cls", "b.jpg"], "b of .* without a label, wanted b.cls"),
    "no label, dots": (["22.05.jpg", "22.04.cls"], "22.05 of .* without a label, wanted 22.05.cls"),
    "no image": (["a.jpg", "a.cls", "b.cls"], "the label b.cls of .* without its image"),
    "no image, dots": (["a.jpg", "a.cls", "1.5.cls"], "the label 1.5.cls of .* without its image"),
    "an image that is not read": (["a.jpg", "a.cls", "b.gif", "b.cls"], "the label b.cls of .* without its image"),
    "a label below 0": (["a.jpg", ("a.cls", b"-1")], "a.cls of .* = b'-1', wanted a whole number from 0 on"),
    "a fraction": (["a.jpg", ("a.cls", b"1.5")], "a.cls of .* = b'1.5', wanted"),
    "an empty label": (["a.jpg", ("a.cls", b"")], "a.cls of .* = b'', wanted"),
    "an underscore": (["a.jpg", ("a.cls", b"1_0")], "a.cls of .* = b'1_0', wanted"),
    "a long label": (["a.jpg", ("a.cls", b"1" * 10**5)], "a.cls of .* = b'111"),
}


@pytest.mark.parametrize("members, words", REFUSED_TARS.values(), ids=REFUSED_TARS)
def test_uncertain_members_are_refused(tmp_path, members, words):
    tar(tmp_path / "0.tar", *members)
    with pytest.raises(UserError, match=words) as error:
        open_source(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_labels_may_have_spaces(tmp_path):
    path = tar(tmp_path / "0.tar", "a.jpg", ("a.cls", b" 12\r\n"), "b.jpg", ("b.cls", b"007"))
    assert open_source(str(path)).labels.tolist() == [12, 7]


# --- tar files that are not whole ---


def damaged_header(data):
    data[3 * 512 + 5] ^= 1  # of the second of three members of 1024 bytes each
    return data


DAMAGES = {
    "cut between members": (lambda data: data[: 2 * 1536], "ends early"),
    "cut in a member": (lambda data: data[: 2 * 1536 + 700], "cannot be read"),
    "cut in a header": (lambda data: data[: 2 * 1536 + 100], "cannot be read"),
    "cut before the end": (lambda data: data[: 3 * 1536], "ends early"),
    "a damaged header": (damaged_header, "damaged header at byte 1536"),
    "zeros in the middle": (lambda data: data[:1536] + bytes(512) + data[1536:], "more data after its end"),
    "two joined": (lambda data: data + data, "more data after its end"),
    "text after the end": (lambda data: data + b"x", "more data after its end"),
    "nothing": (lambda data: b"", "cannot be read"),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_a_tar_file_that_is_not_whole_is_refused(tmp_path, damage, words):
    path = tar(tmp_path / "0.tar", ("a.jpg", bytes(1024)), ("a.txt", bytes(1024)), ("a.cls", b"1".ljust(1024)))
    path.write_bytes(damage(bytearray(path.read_bytes())))
    text = refusal(tmp_path)
    assert words in text and "0.tar" in text


def test_a_header_that_goes_back_is_refused(tmp_path):
    path = tar(tmp_path / "0.tar", ("a.jpg", b""), ("a.cls", b""))
    data = bytearray(path.read_bytes())
    header = data[512:1024]
    header[124:136] = (-512).to_bytes(12, "big", signed=True)  # back to itself, for ever
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    path.write_bytes(data[:512] + header + data[1024:])
    assert "a header with a negative size" in refusal(path)


def test_one_block_of_zeros_is_an_end(tmp_path):
    path = tar(tmp_path / "0.tar", "a.jpg", "a.cls")
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole.ljust(-(-len(whole) // 512) * 512 + 512, b"\0"))
    assert names(path) == ["0.tar:a"]


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TGZ", "1.tar.zst"])
def test_compressed_tar_files_beside_others_are_refused(tmp_path, name):
    put(tar(tmp_path / "0.tar", "a.jpg", "a.cls").parent, name)
    assert f"got {name} beside tar files" in refusal(tmp_path)


def test_tar_files_have_endings_in_any_case(tmp_path):
    tar(tmp_path / "0.TAR", "a.jpg", "a.cls")
    tar(tmp_path / "1.tar", "a.jpg", "a.cls")
    put(tmp_path, "notes.txt")
    source = open_source(str(tmp_path))
    assert source.names == ["0.TAR:a", "1.tar:a"] and left_out(source) == {"notes.txt": entries.NO_DATA}


# --- links ---

HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE
LINKS = {
    "hard": ["a.jpg", "a.cls", ("b.jpg", (HARD, "a.jpg")), "b.cls"],
    "symbolic": ["d/a.jpg", "d/a.cls", ("d/b.jpg", (SYMBOLIC, "a.jpg")), "d/b.cls"],
    "upwards": ["d/a.jpg", "d/a.cls", ("e/b.jpg", (SYMBOLIC, "../d/a.jpg")), "e/b.cls"],
    "of links": ["a.jpg", "a.cls", ("c.x", (HARD, "a.jpg")), ("b.jpg", (SYMBOLIC, "c.x")), "b.cls"],
    "before the file": [("b.jpg", (SYMBOLIC, "a.jpg")), "b.cls", "a.jpg", "a.cls"],
    "of labels": ["a.jpg", "a.cls", "b.jpg", ("b.cls", (HARD, "a.cls"))],
    "to what is hidden": [".store/1", "a.jpg", "a.cls", ("b.jpg", (SYMBOLIC, "./.store/1")), "b.cls"],
    "with a leading dot": ["./a.jpg", "./a.cls", ("./b.jpg", (HARD, "./a.jpg")), "./b.cls"],
}


@pytest.mark.parametrize("members", LINKS.values(), ids=LINKS)
def test_links_in_tar_files_are_followed(tmp_path, members):
    source = open_source(str(tar(tmp_path / "0.tar", *members)))
    assert len(source.names) == 2 and source.labels.tolist() == [1, 1]
    assert [source.read(i) for i in range(2)] == [picture()] * 2


@pytest.mark.parametrize("target", ["nowhere.jpg", "b.jpg", "../a.jpg", "/etc/hostname", "d"])
def test_links_that_lead_to_no_member_are_refused(tmp_path, target):
    path = tar(tmp_path / "0.tar", "d/a.jpg", "d/a.cls", ("b.jpg", (SYMBOLIC, target)), "b.cls")
    assert "got b.jpg of" in refusal(path)


def test_links_in_folders_are_followed(tmp_path):
    put(tmp_path / "store", "x/1.jpg", "2.jpg")
    folder = put(tmp_path / "images", "a/1.jpg")
    (folder / "b").symlink_to(tmp_path / "store" / "x")
    (folder / "a" / "2.jpg").symlink_to(tmp_path / "store" / "2.jpg")
    (folder / "a" / "more").symlink_to(tmp_path / "store")
    assert names(folder) == ["a/1.jpg", "a/2.jpg", "a/more/2.jpg", "a/more/x/1.jpg", "b/1.jpg"]
    assert len(FolderImages(folder)) == 5


@pytest.mark.parametrize("target", [".", "..", "../.."], ids=["itself", "its class", "the source"])
def test_links_to_a_folder_above_are_refused(tmp_path, target):
    folder = put(tmp_path / "images", "a/1.jpg", "a/x/1.jpg")
    (folder / "a" / "x" / "loop").symlink_to(target)
    if target != "../..":  # a class has no way to know the source, but then meets itself
        assert "got a/x/loop, a link to a folder above it" in refusal(folder)
    assert "a link to a folder above it" in refusal(folder)
    with pytest.raises(UserError, match="a link to a folder above it"):
        FolderImages(folder)


def test_links_to_nothing(tmp_path):
    folder = put(tmp_path / "images", "a/1.jpg")
    (folder / "a" / "2.jpg").symlink_to("gone.jpg")
    source = open_source(str(folder))
    with pytest.raises(OSError, match="No such file"):  # an image that cannot be read: --bad-images decides
        source.read(1)
    with pytest.raises(UserError, match="a/2.jpg, which cannot be read .No such file or directory.") as error:
        FolderImages(folder).read([1])
    assert "\n" not in str(error.value)
    for name in ("b", "a/more"):  # a class, or a part of one
        (folder / name).symlink_to("gone")
        assert f"got {name}, a link to nothing" in refusal(folder)
        (folder / name).unlink()


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
