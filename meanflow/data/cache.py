"""The latent cache: a folder of shards in numpy's own format, and a manifest that says what they are of.

    shard_00000.npy    (rows, copies, 2, C, S, S), fp16 or fp32: a row holds mean and std of an image's posterior,
                       unscaled, and with two copies those of the mirrored image after them
    labels_00000.npy   (rows,) int64
    shard_00000.json   sizes and SHA-256 of these two, and the images left out; written after them: a shard is whole
    job.json           what is prepared, from what, how; written first
    manifest.json      the job, the counts and all shards, with a checksum of its own; written last: the cache is whole

Every file is written to `*.partial` in one sequential pass, flushed to the disk and renamed. Which image falls into
which shard follows from the job alone, so any number of processes, killed and resumed, write the same bytes.
"""

import hashlib
import io
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import UserError, require
from ..owner import LOCK, owned
from .entries import NAMED, UNREADABLE, account, reason

FORMAT, VERSION = "meanflow-latents", 1
DTYPES = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
REPEAT = "repeat the command that prepared it"
ABSENT = {"exif": "ignore", "alpha": "drop"}
"""Settings of jobs written before these options existed."""


# --- files ---


def _write(path: Path, parts: list) -> dict:
    """Write buffers one after the other, all or nothing; returns the file's name, size and SHA-256."""
    partial, digest, size = path.with_name(path.name + ".partial"), hashlib.sha256(), 0
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _write_json(path: Path, values: dict) -> None:
    _write(path, [json.dumps(values, indent=1).encode() + b"\n"])


def _write_array(path: Path, array: np.ndarray) -> dict:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return _write(path, [header.getvalue(), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _damage(folder: Path, file: dict, *, read: bool) -> str | None:
    """Check a file of the manifest, by its size or by reading it; returns what is wrong."""
    path = folder / file["file"]
    try:
        size = path.stat().st_size
        if size != file["bytes"]:
            return f"{path.name} has {size} bytes instead of {file['bytes']}"
        if read and _sha256(path) != file["sha256"]:
            return f"{path.name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None


# --- writing ---


class Builder:
    """Writes a cache shard by shard, keeping the shards that a folder holds already.

    Args:
        folder: of the cache.
        job: what is prepared: "count" images in shards of "shard_rows", "latent_shape", "dtype", "flipped", "classes"
            (names, or None), "source", "vae" and whatever else decides the bytes.
    """

    def __init__(self, folder: Path, job: dict):
        # as JSON will return it: a tuple becomes a list
        self.folder, self.job = folder, json.loads(json.dumps({"format": FORMAT, "version": VERSION} | job))

    def begin(self) -> None:
        """Prepare the folder, or find the same job in it.

        Raises:
            UserError: for a folder that holds another job, or something else.
        """
        job = self.folder / "job.json"
        if not _is_json(job) and (self.folder / "manifest.json").exists():
            # the manifest holds the job, and has a checksum
            manifest = read_manifest(self.folder)
            _write_json(job, {name: manifest[name] for name in self.job if name in manifest})
        if not job.exists():
            names = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
            present = [name for name in names if not name.endswith(".partial") and name != LOCK]
            if present:
                raise UserError(
                    f"out: got {self.folder}, which holds {present[0]}, wanted an empty or new folder; name another"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(job, self.job)
        self.check()

    @contextmanager
    def alone(self):
        """Keep other commands from writing to the folder within a with block.

        Raises:
            UserError: where another one does.
        """
        with owned(self.folder):
            for stale in self.folder.glob("*.partial"):  # left by a process that was killed while writing
                stale.unlink()
            yield

    def check(self) -> None:
        """Raise UserError unless the folder's job is this one; the paths of source and VAE may differ."""
        found = _read_json(self.folder / "job.json", "remove the folder and prepare it anew")
        for name in sorted(found.keys() | self.job.keys()):
            theirs, ours = (_content(job.get(name, ABSENT.get(name))) for job in (found, self.job))
            if theirs != ours:
                raise UserError(
                    f"{name}: got {_short(ours)}, wanted {_short(theirs)} as {self.folder} was begun with; "
                    "repeat that command, or name another folder"
                )
        self.job = found

    @property
    def shards(self) -> int:
        """Number of shards of the whole cache."""
        return -(-self.job["count"] // self.job["shard_rows"])

    def members(self, shard: int) -> range:
        """The job's images that a shard holds."""
        rows = self.job["shard_rows"]
        return range(shard * rows, min((shard + 1) * rows, self.job["count"]))

    def missing(self, *, read: bool = False) -> list[int]:
        """Find the shards that are not whole, by their files' sizes, or by reading them all."""
        return [shard for shard in range(self.shards) if self._entry(shard, read=read) is None]

    def _entry(self, shard: int, *, read: bool) -> dict | None:
        try:
            entry = json.loads((self.folder / f"shard_{shard:05d}.json").read_bytes())
            damaged = any(_damage(self.folder, entry[part], read=read) for part in ("latents", "labels"))
            fits = self._fits(entry, shard)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return None if damaged or not fits else entry

    def _fits(self, entry: dict, shard: int) -> bool:
        """Whether a shard's entry is as put writes it; entries have no checksum of their own."""
        files = [(entry["latents"], f"shard_{shard:05d}.npy"), (entry["labels"], f"labels_{shard:05d}.npy")]
        named = all(file["file"] == name and isinstance(file["sha256"], str) for file, name in files)
        skipped = all(isinstance(x, str) for name, why in entry["skipped"] for x in (name, why))
        counted = all(type(count) is int for count in entry["converted"].values())
        return named and skipped and counted and entry["rows"] == len(self.members(shard)) - len(entry["skipped"])

    def put(self, shard: int, latents: np.ndarray, labels: np.ndarray, skipped: list, converted: dict) -> None:
        """Write a shard.

        Args:
            latents: (rows, copies, 2, C, S, S). labels: (rows,).
            skipped: [name, reason] of each image left out. converted: how many were of another mode than RGB, by mode.
        """
        latents = latents.astype(DTYPES[self.job["dtype"]], copy=False)
        entry = {
            "rows": len(labels),
            "latents": _write_array(self.folder / f"shard_{shard:05d}.npy", latents),
            "labels": _write_array(self.folder / f"labels_{shard:05d}.npy", labels.astype(np.int64)),
            "skipped": skipped,
            "converted": dict(sorted(converted.items())),
        }
        _write_json(self.folder / f"shard_{shard:05d}.json", entry)

    def finish(self, left_out: dict | None = None) -> dict:
        """Write the manifest; every shard must be whole.

        Args:
            left_out: of the source's entries before they were read, see meanflow.data.entries.Entries.left_out.
        """
        shards = [self._entry(shard, read=False) for shard in range(self.shards)]
        converted: dict[str, int] = {}
        for entry in shards:
            for mode, count in entry.pop("converted").items():
                converted[mode] = converted.get(mode, 0) + count
        skipped = [image for entry in shards for image in entry.pop("skipped")]
        rows = sum(entry["rows"] for entry in shards)
        unreadable = {"count": len(skipped), "names": [name for name, _ in skipped[:NAMED]]}
        left_out = (left_out or {}) | ({UNREADABLE: unreadable} if skipped else {})
        manifest = self.job | {
            "rows": rows,
            "entries": account(left_out, rows),
            "converted": dict(sorted(converted.items())),
            "skipped": skipped,
            "shards": shards,
        }
        _write_json(self.folder / "manifest.json", manifest | {"checksum": _checksum(manifest)})
        return manifest


def _content(value: object) -> object:
    """A job without the paths of source and VAE."""
    return {k: v for k, v in value.items() if k not in ("path", "name")} if isinstance(value, dict) else value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --- reading ---


def _read_json(path: Path, hint: str) -> dict:
    try:
        values = json.loads(path.read_bytes())
        if isinstance(values, dict):
            return values
        why = "it is no JSON object"
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error)
    raise UserError(f"cache: got {path}, which cannot be read ({why}), wanted a whole one; {hint}")


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a cache.

    Raises:
        UserError: for a folder without a manifest, or a damaged one.
    """
    if not (folder / "manifest.json").exists():
        known = (folder / "job.json").exists()
        hint = f"its preparation has not ended: {REPEAT}" if known else "prepare it by scripts/prepare_data.py"
        raise UserError(f"cache: got {folder}, which has no manifest.json, wanted a folder of latents; {hint}")
    manifest = _read_json(folder / "manifest.json", REPEAT)
    checksum = manifest.pop("checksum", None)
    version = (manifest.get("format"), manifest.get("version"))
    if checksum != _checksum(manifest):
        raise UserError(
            f"cache: got {folder}/manifest.json, which does not match its checksum, wanted an intact one; {REPEAT}"
        )
    wanted, hint = (FORMAT, VERSION), "was it written by this version?"
    require(version == wanted, f"{folder}/manifest.json", version, f"{wanted}", hint)
    return manifest


def verify(folder: Path) -> list[str]:
    """Read a whole cache; returns what is wrong with it, one line per bad shard.

    Raises:
        UserError: for a folder without a manifest, or a damaged one.
    """
    problems = []
    for index, entry in enumerate(read_manifest(folder)["shards"]):
        damages = [_damage(folder, entry[part], read=True) for part in ("latents", "labels")]
        if damage := ", ".join(filter(None, damages)):
            problems.append(f"shard {index}: {damage}")
    return problems


class Cache:
    """A cache, memory-mapped. Opening it looks at every file's size and header, and at all labels.

    Raises:
        UserError: for a missing or damaged manifest, or a shard that is not there or not whole.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.shape: tuple[int, int, int] = tuple(self.manifest["latent_shape"])
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.flipped: bool = self.manifest["flipped"]
        shards = self.manifest["shards"]
        for entry in shards:
            for part in ("latents", "labels"):
                damage = _damage(folder, entry[part], read=False)
                if damage is not None:
                    raise UserError(f"cache: got {folder}, of which {damage}, wanted a whole one; {REPEAT}")
        copies = 2 if self.flipped else 1
        self._shards = [self._open(e["latents"], (e["rows"], copies, 2, *self.shape), self.dtype) for e in shards]
        labels = [self._open(e["labels"], (e["rows"],), np.dtype(np.int64)) for e in shards]
        self.labels: np.ndarray = np.concatenate(labels)
        rows = [entry["rows"] for entry in shards]
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows

    def _open(self, file: dict, shape: tuple, dtype: np.dtype) -> np.ndarray:
        path = self.folder / file["file"]
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy passes on what Python's parser thinks of a damaged header
            raise UserError(
                f"cache: got {path}, which cannot be read ({reason(error)}), wanted an array; {REPEAT}"
            ) from None
        got = (array.shape, str(array.dtype))
        require(got == (shape, str(dtype)), str(path), got, f"{(shape, str(dtype))}", REPEAT)
        return array.view(np.ndarray)  # np.memmap costs a microsecond an access

    def __len__(self) -> int:
        return len(self.labels)

    def posterior(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std (B, C, S, S), in the stored dtype.

        Args:
            indices: (B,) rows of the whole cache.
            mirrored: (B,) bool, whether the copy of the mirrored image is read; the cache must have it.
        """
        shards = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._starts[shards]
        copies = np.zeros(len(indices), int) if mirrored is None else mirrored.astype(int)
        mean = np.empty((len(indices), *self.shape), self.dtype)
        std = np.empty_like(mean)
        for i, (shard, row, copy) in enumerate(zip(shards.tolist(), rows.tolist(), copies.tolist(), strict=True)):
            mean[i], std[i] = self._shards[shard][row, copy]
        return mean, std
