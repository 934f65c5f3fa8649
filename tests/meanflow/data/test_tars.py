"""Members of tar files: keys, labels, damage and links."""

import tarfile

import pytest
from image_entries import BLUE, RED, left_out, names, picture, put, refusal, tar

from meanflow.data import entries
from meanflow.data.sources import decode, open_source
from meanflow.errors import UserError
from meanflow.evaluation.fid_reference import FolderImages

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
