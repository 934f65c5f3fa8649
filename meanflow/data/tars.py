"""WebDataset's tar files as a list of labelled images."""

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .entries import HIDDEN, IMAGE_ENDINGS, NO_DATA, NO_FILE, Entries, check_size, is_hidden, is_image, reason, shown
from .labels import read_label

FURTHER, REPLACED = "a further image of its key", "replaced by a later member of its name"
LABEL, LABEL_BYTES = ".cls", 64
CHUNK = 2**20


class Member(NamedTuple):
    """A member of a tar file."""

    name: str
    """Name as written in the file."""
    place: tuple[int, int] | None
    """Offset and size of its bytes, if they lie in one piece."""
    target: str | None
    """The member that a link names."""


class Sample(NamedTuple):
    """An image of a tar file."""

    key: str
    place: tuple[int, int]
    label: int


class TarFiles:
    """Uncompressed tar files of KEY.jpg beside KEY.cls, which holds the label as a number.

    The images keep the tar files' order, files sorted by name. An ending is what follows a name's last dot, in any
    case. An image KEY.more.png without a label of its own is left out beside KEY.jpg; without KEY.jpg it is the key's
    image. Of members of one name the last counts, as when unpacking. Links to members are followed.
    """

    kind = "tar files"
    classes: list[str] | None = None

    def __init__(self, files: list[Path], entries: Entries):
        self.entries, self.names, self._places, labels = entries, [], [], []
        for path in files:
            for key, place, label in _Tar(path, entries).samples():
                self.names.append(f"{path.name}:{key}")
                self._places.append((path, *place))
                labels.append(label)
        entries.close(len(self.names))
        self.labels = np.array(labels, np.int64)

    def read(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        check_size(size)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class _Tar:
    """The members of a tar file by their names, those replaced by later ones left out.

    Raises:
        UserError: for a file that is no plain tar file, has a damaged header, ends early or goes on after its end.
    """

    def __init__(self, path: Path, entries: Entries):
        self.path, self.entries = path, entries
        self.members: dict[str, Member] = {}
        try:
            with tarfile.open(path, "r:") as tar:  # plain tar only: reading in any order needs seeking
                for info in tar:
                    self._add(info)
                _check_end(path, tar.offset)
        except Exception as error:  # tarfile's own, and for damaged headers those of its helpers
            raise UserError(
                f"source: got {shown(path)}, which cannot be read ({reason(error)}), wanted a plain tar file of "
                "KEY.jpg and KEY.cls (a number), whole; unpack it if it is compressed, else make or fetch it again"
            ) from None

    def _add(self, info: tarfile.TarInfo) -> None:
        if info.size < 0:  # it would send the reading back to where it was
            raise tarfile.ReadError("a header with a negative size")
        if info.isdir():
            return
        target = None
        if info.islnk():
            target = posixpath.normpath(info.linkname)
        elif info.issym():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
        plain = info.isreg() and not info.issparse()
        name = posixpath.normpath(info.name)
        if name in self.members:
            self.entries.leave_out(f"{self.path.name}:{info.name}", REPLACED)
        self.members[name] = Member(info.name, (info.offset_data, info.size) if plain else None, target)

    def samples(self) -> Iterator[Sample]:
        """List the images with their labels, in the file's order; other members are left out or refused."""
        data = [name for name in self.members if self._is_data(name)]
        labels: dict[str, list[str]] = {}
        images: dict[str, list[str]] = {}
        for name in data:
            if not is_image(name):
                labels.setdefault(name[: -len(LABEL)], []).append(name)
        for name in filter(is_image, data):
            key = next((key for key in _keys(name) if key in labels), next(_keys(name)))
            images.setdefault(key, []).append(name)
        for key, names in images.items():
            beside = labels.pop(key, [])
            try:
                image = self._image(key, names)
                place, label = self._place(image), self._label(image, beside)
            except UserError as error:
                self.entries.refuse(str(error), len(names))
                continue
            for name in names:
                if name != image:
                    self._leave_out(name, FURTHER)
            # where there was a choice the name says which: a cache that was begun with the other image is another
            yield Sample(self.members[image].name if len(names) > 1 else self._key(image, key), place, label)
        for name in (name for names in labels.values() for name in names):
            self.entries.refuse(
                f"source: got the label {shown(name)} of {shown(self.path)} without its image, wanted "
                f"{shown(name[: -len(LABEL)])} with one of {' '.join(IMAGE_ENDINGS)}; add it, or remove the label"
            )

    def _leave_out(self, name: str, why: str) -> None:
        self.entries.leave_out(f"{self.path.name}:{self.members[name].name}", why)

    def _is_data(self, name: str) -> bool:
        """Whether a member is an image or a label; records others as left out."""
        member = self.members[name]
        if is_hidden(name):
            self._leave_out(name, HIDDEN)
        elif not (is_image(name) or name.lower().endswith(LABEL)):
            self._leave_out(name, NO_DATA)
        elif member.place is None and member.target is None:
            self._leave_out(name, NO_FILE)
        else:
            return True
        return False

    def _image(self, key: str, names: list[str]) -> str:
        """The image of a key: the only one, or the only KEY.ending."""
        exact = [name for name in names if next(_keys(name)) == key]
        chosen = names if len(names) == 1 else exact
        if len(chosen) != 1:
            found = " and ".join(map(shown, (exact or names)[:3]))
            raise UserError(
                f"source: got {found} of {shown(self.path)}, {len(exact or names)} images of one key, wanted one, or "
                f"one that is called {shown(key)}.jpg or so; name it so, or remove the others"
            )
        return chosen[0]

    def _key(self, name: str, key: str) -> str:
        """Spell a key with its folder as the file does."""
        folder = self.members[name].name.rpartition("/")[0]
        return f"{folder}/{posixpath.basename(key)}" if folder else posixpath.basename(key)

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size of a member, or of its link's target."""
        member, seen = self.members[name], {name}
        while member.target is not None:
            if member.target in seen or member.target not in self.members:
                raise UserError(
                    f"source: got {shown(name)} of {shown(self.path)}, a link to {shown(member.target)}, wanted a link "
                    "to a file of the same tar file; store the file itself"
                )
            seen.add(member.target)
            member = self.members[member.target]
        if member.place is None:
            raise UserError(
                f"source: got {shown(name)} of {shown(self.path)}, which leads to no plain file, wanted one; store "
                "the file itself"
            )
        return member.place

    def _label(self, image: str, names: list[str]) -> int:
        if len(names) != 1:
            got = f"{' and '.join(map(shown, names[:3]))}, {len(names)} labels" if names else "without a label"
            key = self._key(image, next(_keys(image)))
            raise UserError(
                f"source: got {shown(key)} of {shown(self.path)} {got}, wanted {shown(key)}{LABEL}; "
                f"{'remove the others' if names else 'add it'}"
            )
        offset, size = self._place(names[0])
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.read(min(size, LABEL_BYTES))
        return read_label(text, f"{shown(names[0])} of {shown(self.path)}").value


def _keys(name: str) -> Iterator[str]:
    """Possible keys of a name: without its ending, then without one more dotted suffix at a time."""
    folder, slash, base = name.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        yield folder + slash + base


def _check_end(path: Path, offset: int) -> None:
    """Raise ReadError unless only zeros follow the members: tarfile stops silently at a damaged header."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends early: the block of zeros that ends a tar file is missing")
        if any(block):
            raise tarfile.ReadError(f"damaged header at byte {offset}")
        while more := file.read(CHUNK):
            if more.count(0) != len(more):
                raise tarfile.ReadError(f"more data after its end at byte {offset}, as of two tar files joined")
