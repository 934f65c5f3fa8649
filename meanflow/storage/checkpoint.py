"""Checkpoints by torch.distributed.checkpoint, in safetensors shards: whole or absent, checked when read.

    checkpoints/step_00005000/
        checkpoint.json                               step, configuration, processes, each file's size and checksum
        shard-00001-model-00001-of-00002.safetensors  of process 1: averaged weights, all that sampling needs
        shard-00001-model-00002-of-00002.safetensors  of process 1: weights, optimizer, log

Each process writes its share; any number of processes can read it. A checkpoint is written in the background to a
folder `.partial`, which is renamed last. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..world import World

FORMAT, WEIGHTS_FORMAT = "meanflow-checkpoint-2", "meanflow-weights-1"
FOLDER, HEADER = "checkpoints", "checkpoint.json"
PARTIAL, ASIDE = ".partial", ".aside"
EMA_FILES, OTHER_FILES = 1, 2


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint, checkpoint.json."""

    step: int
    config: dict
    """The run's configuration, by section."""
    position: int
    """Index of the next batch; larger than step after a rollback has skipped batches."""
    processes: int
    """Number of processes that wrote it."""
    files: dict[str, dict]
    """{file: {bytes, sha256}}."""


class Damaged(UserError):
    """A checkpoint that differs from what was written."""


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(
        f"checkpoint: got {path}, {what}, wanted a whole one written by this project; remove it to fall back to the "
        "one before, or name another"
    )


# --- reading ---


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def read_header(path: Path) -> Header:
    """Read the header of a checkpoint, and compare its files' sizes.

    Raises:
        Damaged: if it cannot be read, is foreign, or a file is missing or of another size.
    """
    try:
        values = json.loads((path / HEADER).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"whose {HEADER} cannot be read ({error})") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise _damaged(path, "in a foreign format")
    try:
        header = Header(**values)
    except TypeError as error:
        raise _damaged(path, f"whose {HEADER} is not complete ({error})") from None
    for name, held in header.files.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != held["bytes"]:
            found = "missing" if size is None else f"of {size} bytes instead of {held['bytes']}"
            raise _damaged(path, f"whose {name} is {found}")
    return header


def verify(path: Path, header: Header, *, ema_only: bool = False, share: slice = slice(None)) -> None:
    """Compare the files' contents with their checksums.

    Args:
        ema_only: check only the averaged weights. share: of the files, for one of several processes.

    Raises:
        Damaged: naming the first file that differs.
    """
    names = sorted(name for name in header.files if not ema_only or f"model-{EMA_FILES:05d}-of" in name)
    for name in names[share]:
        if _file_sha256(path / name) != header.files[name]["sha256"]:
            raise _damaged(path, f"whose {name} does not match its checksum")


def load(path: Path, tensors: dict[str, Tensor], world: World | None = None) -> None:
    """Fill tensors, sharded in any way or whole, from a checkpoint; all processes together, or one alone.

    Raises:
        UserError: if the checkpoint lacks one of them or has it in another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    held = reader.read_metadata().state_dict_metadata
    for name, x in tensors.items():
        if name not in held or held[name].size != x.shape:
            got = f"{name} of shape {tuple(held[name].size)}" if name in held else f"no {name}"
            raise UserError(
                f"checkpoint: got {path}, which has {got}, wanted one that fits the model and its optimizer "
                f"({name} of shape {tuple(x.shape)}); name another"
            )
    several = world is not None and world.size > 1
    _quiet()
    dcp.load(tensors, storage_reader=reader, no_dist=not several, process_group=world.host_group if several else None)


def load_network(path: Path, weights: str) -> dict[str, Tensor]:
    """Load a checkpoint's network, "ema" or "model": whole tensors on the CPU, by their names in it."""
    held = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in held.items()
        if name.startswith(f"{weights}.")
    }
    load(path, tensors)
    return {name.removeprefix(f"{weights}."): x for name, x in tensors.items()}


def last_good(folder: Path, world: World, until: int | None = None) -> Path | None:
    """Find the newest intact checkpoint; rename later ones, which are damaged or given up.

    Args:
        until: the largest position it may have; None: any.

    Raises:
        Damaged: if there are checkpoints, but none is intact.
    """
    found = world.broadcast(checkpoints(folder))
    for path in reversed(found):
        # the processes share the reading and agree on the result
        mine = slice(world.rank, None, world.size)
        error = world.first_error(lambda path=path, mine=mine: verify(path, read_header(path), share=mine))
        if error is None and (until is None or read_header(path).position <= until):
            if world.is_main:
                for later in found[found.index(path) + 1 :]:
                    later.rename(_unused(later.with_name(later.name + ASIDE)))
            return path
        if error is not None and path == found[0]:
            raise error
        if error is not None and world.is_main:
            print(f"{error}; now it is set aside as {path.name}{ASIDE}, an earlier one is taken", flush=True)
    return None


def _unused(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}{i}") for i in range(2, 1000)))
    return next(name for name in names if not name.exists())


# --- writing ---


class Checkpointer:
    """Writes a run's checkpoints in the background, and removes old ones.

    Args:
        folder: of the checkpoints. world: the processes, each of which writes a share.
        keep_last: number of latest ones to keep. keep_every: keep those of steps that are multiples of it; 0: none.
    """

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int = 0):
        self.folder, self.world, self.keep_last, self.keep_every = folder, world, keep_last, keep_every
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._bytes = 0

    def save(self, step: int, config: dict, position: int, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write a checkpoint; the tensors may change once this returns.

        Raises:
            UserError: if the previous one could not be written, or this one not begun.
        """
        self.wait()
        path = self.folder / f"step_{step:08d}"
        if path.exists():
            return
        partial = path.with_name(path.name + PARTIAL)
        self.clear()
        self._bytes = sum(x.nbytes for x in tensors.values())
        files = {name: EMA_FILES if name.startswith("ema.") else OTHER_FILES for name in tensors}
        writer = dcp.HuggingFaceStorageWriter(str(partial), files, save_distributed=True)
        several = self.world.size > 1
        _quiet()
        written = dcp.async_save(
            dict(tensors), storage_writer=writer, process_group=self.world.checkpoint_group, no_dist=not several
        )
        header = Header(step, config, position, self.world.size, {})
        self._writer = threading.Thread(target=self._finish, args=(written, partial, path, header))
        self._writer.start()

    def clear(self) -> None:
        """Remove checkpoints that a killed run left half written or half removed.

        Raises:
            UserError: if the folder cannot be written.
        """
        self.world.agree(self._clear, main_only=True)

    def wait(self) -> None:
        """Wait for the checkpoint under way.

        Raises:
            UserError: if it could not be written; older ones are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _clear(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("*" + PARTIAL):
                shutil.rmtree(stale)
        except OSError as error:
            raise self._unwritable(self.folder, error) from None

    def _finish(self, written: Future, partial: Path, path: Path, header: Header) -> None:
        """Wait for all shards, rename the checkpoint, remove old ones; runs in the background."""
        try:
            mine, failure = {}, None
            try:
                written.result()
                mine = self._my_files(partial)
            except BaseException as error:  # the other processes must hear of it; torch raises no Exception here
                failure = _cause(error)
            answers = self._gather((mine, failure))
            failure = next((failure for _, failure in answers if failure is not None), None)
            if self.world.is_main:
                if failure is None:
                    files = {name: held for files, _ in answers for name, held in files.items()}
                    failure = self._name(partial, path, header, files)
                if failure is not None:
                    shutil.rmtree(partial, ignore_errors=True)
            failure = self._gather(failure)[0]
            if failure is not None:
                raise self._unwritable(path, failure)
        except BaseException as error:  # raised in the main thread
            self._failure = error

    def _gather(self, value) -> list:
        if self.world.size == 1:
            return [value]
        values = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.world.checkpoint_group)
        return values

    def _my_files(self, partial: Path) -> dict[str, dict]:
        """Flush this process's files to the disk; returns their sizes and checksums."""
        files = {}
        for file in sorted(partial.glob(f"shard-{self.world.rank + 1:05d}-*")):
            _flush(file)
            files[file.name] = {"bytes": file.stat().st_size, "sha256": _file_sha256(file)}
        return files

    def _name(self, partial: Path, path: Path, header: Header, files: dict[str, dict]) -> str | None:
        """Rename a whole checkpoint, and remove old ones; returns the error, if any."""
        try:
            values = {"format": FORMAT} | asdict(header) | {"files": files}
            (partial / HEADER).write_text(json.dumps(values, indent=1) + "\n")
            _flush(partial / HEADER)
            _flush(partial)
            os.rename(partial, path)
            _flush(self.folder)
            for old in checkpoints(self.folder)[: -self.keep_last]:
                if not self.keep_every or int(old.name.removeprefix("step_")) % self.keep_every:
                    # renamed first: a half removed one must not look like a checkpoint
                    shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
        except OSError as error:
            return str(error)
        return None

    def _unwritable(self, path: Path, error: object) -> UserError:
        return UserError(
            f"checkpoint: got {path}, which cannot be written ({error}), wanted {self._bytes / 2**20:.1f} MiB free in "
            "a writable folder; make room or name another by --out, and repeat the command"
        )


def _quiet() -> None:
    # a single process runs without torch.distributed on purpose
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _cause(error: BaseException) -> str:
    """Innermost cause of an error, in one line: torch.distributed.checkpoint wraps each process's."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- weights alone ---


def save_weights(path: Path, tensors: Mapping[str, Tensor], config: dict, step: int) -> None:
    """Save one network's weights and configuration as one safetensors file, to sample from and to publish.

    Raises:
        UserError: if the file cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {"format": WEIGHTS_FORMAT, "step": str(step), "config": json.dumps(config), "sha256": _sha256(tensors)}
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        _flush(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(x.nbytes for x in tensors.values()) / 2**20
        raise UserError(
            f"out: got {path}, which cannot be written ({error}), wanted {size:.0f} MiB free in a writable folder; "
            "make room or name another"
        ) from None


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict, int]:
    """Load the tensors, configuration and step of :func:`save_weights`.

    Raises:
        Damaged: if the file is missing, damaged or foreign.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"which cannot be read ({error})") from None
    if metadata.get("format") != WEIGHTS_FORMAT:
        raise _damaged(path, "a foreign safetensors file")
    if metadata["sha256"] != _sha256(tensors):
        raise _damaged(path, "whose contents do not match their checksum")
    return tensors, json.loads(metadata["config"]), int(metadata["step"])


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
