"""Entries of a source: one set of rules for class folders, tar files, image sets, FID folders and imports.

An entry is an image (in a tar file together with its label), or any other file, member or row. Each is used, left out
by name and reason, or refused: used + left out + refused = entries.

left out   what is hidden or of the system, what has no image's ending, what is no regular file
refused    what is meant as data but has no certain meaning: the whole source is then refused in one line
links      are followed; one that leads to a folder above it is refused, and one to nothing too, unless it has an
           image's ending: then it is an image that cannot be read
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files, in any case."""
SYSTEM = {
    "__macosx", "__pycache__", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information",
    "@eadir",
}  # fmt: skip
"""Names that systems leave behind, in lower case; so are all names that begin with a dot."""
HIDDEN, NO_DATA, NO_FILE = "hidden, or of the system", "no data by its ending", "no regular file"
UNREADABLE, UNCHOSEN = "cannot be read", "not among the images of --limit"
NAMED = 1000
"""Most names listed for each reason to leave entries out; all are counted."""
MAX_BYTES = 2**28
"""Size limit of an image file."""


def is_hidden(name: str) -> bool:
    """Whether a component of a path is hidden, or of the system; "." and ".." are not."""
    parts = (part.lower() for part in name.split("/"))
    return any(part in SYSTEM or part.startswith(".") and part not in (".", "..") for part in parts)


def is_image(name: str) -> bool:
    """Whether a name ends like an image."""
    return name.lower().endswith(IMAGE_ENDINGS)


def shown(name: object) -> str:
    """A name for one line of a terminal, escaped if it holds what cannot be printed."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def reason(error: Exception) -> str:
    """An error in one line that is the same on every machine: without paths and addresses."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = re.sub(r"( at )?\b0x[0-9a-fA-F]{6,}\b", "", text)
    text = re.sub(r"(?<![\w.])(/[^\s/'\":,)]+)+/?", "a path", text)
    words = [shown(word) for word in text.split()[:40]] or [type(error).__name__]
    return " ".join(words)[:200]


def read_file(path: Path) -> bytes:
    """Read a file's bytes.

    Raises:
        OSError, ValueError: if it cannot be read, or is larger than MAX_BYTES.
    """
    with path.open("rb") as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def check_size(size: int) -> None:
    """Raise ValueError for a file that is larger than MAX_BYTES."""
    if size > MAX_BYTES:
        raise ValueError(f"a file of {size:,} bytes, more than {MAX_BYTES:,}")


class Entries:
    """The account of a source's entries."""

    def __init__(self):
        self.used = 0
        self._left_out: dict[str, tuple[int, list[str]]] = {}
        self._refused = 0
        self._refusal: str | None = None

    def leave_out(self, name: str, why: str) -> None:
        """Record an entry that is not used."""
        known, names = self._left_out.setdefault(why, (0, []))
        if len(names) < NAMED:
            names.append(name)
        self._left_out[why] = (known + 1, names)

    def refuse(self, message: str, count: int = 1) -> None:
        """Record entries that cannot be used, by a whole line in the form of :class:`UserError`."""
        self._refused += count
        self._refusal = self._refusal or message

    def close(self, used: int) -> None:
        """End the account; `used` entries are used.

        Raises:
            UserError: if entries are refused, for the first of them.
        """
        self.used = used
        if self._refusal:
            more = f" ({self._refused} of {self.count} entries are refused)" if self._refused > 1 else ""
            raise UserError(self._refusal + more)

    @property
    def count(self) -> int:
        """Number of all entries."""
        return self.used + sum(count for count, _ in self._left_out.values()) + self._refused

    def left_out(self) -> dict[str, dict]:
        """{reason: {"count": of entries, "names": of the first ones}}."""
        return {why: {"count": count, "names": names} for why, (count, names) in sorted(self._left_out.items())}


def walk(root: Path, below: str, entries: Entries, endings: str | tuple[str, ...] = IMAGE_ENDINGS) -> Iterator[str]:
    """Yield the data files in and below a folder of root, as names relative to root."""
    waiting: list[tuple[str, tuple]] = [(below, ())]
    while waiting:
        folder, above = waiting.pop()
        try:
            place = (root / folder).stat()
            found = [(entry, entry.is_dir()) for entry in sorted(os.scandir(root / folder), key=lambda e: e.name)]
        except OSError as error:
            got = f"{shown(root / folder)}, which cannot be read ({reason(error)})"
            raise UserError(f"source: got {got}, wanted a folder; correct its rights or its link") from None
        above = (*above, (place.st_dev, place.st_ino))
        if above[-1] in above[:-1]:
            got = f"{shown(folder)}, a link to a folder above it"
            entries.refuse(f"source: got {got}, wanted folders without circles; remove the link")
            continue
        for entry, is_folder in found:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                entries.leave_out(name, HIDDEN)
            elif is_folder:
                waiting.append((name, above))
            elif _is_data(entry, name, entries, endings):
                yield name


def _is_data(entry: os.DirEntry, name: str, entries: Entries, endings: str | tuple[str, ...]) -> bool:
    """Whether a file is data, readable or not; records others as left out or refused."""
    is_data = name.lower().endswith(endings)
    dangling = entry.is_symlink() and not os.path.exists(entry.path)
    if is_data and (dangling or entry.is_file()):
        return True
    if dangling:
        entries.refuse(f"source: got {shown(name)}, a link to nothing, wanted a file or folder; correct or remove it")
    else:
        entries.leave_out(name, NO_FILE if is_data else NO_DATA)
    return False


def holds_images(path: Path, depth: int) -> bool:
    """Whether a folder that is not hidden holds images, itself or in folders down to a number of levels below."""
    if is_hidden(path.name):
        return False
    folders = []
    with os.scandir(path) as found:
        for entry in found:
            if entry.is_dir():
                folders.append(Path(entry.path))
            elif is_image(entry.name) and not is_hidden(entry.name):
                return True
    return depth > 0 and any(holds_images(folder, depth - 1) for folder in folders)


def account(left_out: dict[str, dict], used: int) -> dict:
    """Number of entries, and those left out as {reason: {"count", "names"}}; refused sources get no account."""
    left = sum(those["count"] for those in left_out.values())
    return {"count": used + left, "used": used, "left_out": left, "refused": 0, "reasons": left_out}


def describe(entries: dict) -> list[str]:
    """Format an :func:`account` as lines for a terminal."""
    counts = ", ".join(f"{entries[key]} {key.replace('_', ' ')}" for key in ("used", "left_out", "refused"))
    lines = [f"{entries['count']} entries: {counts}"]
    for why, those in entries["reasons"].items():
        more = ", ..." if those["count"] > 3 else ""
        lines.append(f"  left out {those['count']}, {why}: {', '.join(map(shown, those['names'][:3]))}{more}")
    return lines


def describe_classes(labels: Iterable[int], classes: list[str] | None) -> str:
    """Say in one line how many classes there are, which, and which have no image.

    Args:
        labels: of all images. classes: their names by label, where they are known.
    """
    used = set(labels)
    names = range(max(used, default=-1) + 1) if classes is None else [shown(name) for name in classes]
    some = names if len(names) <= 20 else [*names[:4], "...", names[-1]]
    text = f"{len(names)} classes: {', '.join(map(str, some))}"
    if without := len(names) - len(used):
        first = itertools.islice((str(names[i]) for i in range(len(names)) if i not in used), 8)
        text += f"; {without} of them without an image: {', '.join(first)}{', ...' if without > 8 else ''}"
    return text
