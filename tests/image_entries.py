"""Small image folders and tar files, and what is taken of them."""

import io
import tarfile

import pytest
from PIL import Image

from meanflow.data.sources import open_source
from meanflow.errors import UserError

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


def tar(path, *members, mode="w"):
    """Members: a name, of an image or of the label 1, or a pair of a name and bytes, or of (type, link's name)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
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
