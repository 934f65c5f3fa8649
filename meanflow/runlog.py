"""What a run leaves to read: config, environment, JSON lines and TensorBoard scalars, pictures of samples."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, require
from .images import grid, save_png
from .objective import Terms

PACKAGES = ("torch", "triton", "numpy", "diffusers", "safetensors")


def environment() -> dict:
    """Versions, commit and hardware."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions, "commit": commit(), "gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()}


def commit() -> str | None:
    """The commit of the source tree, "-dirty" appended where it is modified; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class RunLog:
    """The run folder's log. Sums over the steps of an interval stay on the device until they are written."""

    def __init__(self, out: Path):
        self.out = out
        self.config_path = out / "config.json"
        self._sums: dict[str, Tensor] = {}
        self._tensorboard = None
        self._clock = time.perf_counter()

    # --- the folder ---

    def check(self, config: dict, continuable: tuple[str, ...]) -> None:
        """Raise unless the folder is new or holds the same run, and can be written.

        Raises:
            UserError: otherwise; the folder is as it was.
        """
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / "environment.json", json.dumps(environment(), indent=2) + "\n")
            held = json.loads(self.config_path.read_text()) if self.config_path.exists() else config
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"out: got {self.out}, which cannot be used ({error}), wanted a writable run folder; "
                "name another by --out"
            ) from None
        self._compare(held, config, continuable)

    def _compare(self, held: dict, config: dict, continuable: tuple[str, ...]) -> None:
        for section, options in config.items():
            for name, value in options.items():
                if f"{section}.{name}" in continuable:
                    continue
                before = held.get(section, {}).get(name)
                require(
                    before == value,
                    f"{section}.{name}", value, f"{before!r}, as in the run that {self.out} holds",
                    "name another folder by --out to start a new run",
                )  # fmt: skip

    def start(self, config: dict, step: int) -> None:
        """Record the configuration and drop the lines after a step: the run goes on from there."""
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        write_atomically(self.config_path, json.dumps(config, indent=2) + "\n")
        path = self.out / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the half line of a run that was killed
                    break
                if row["step"] > step:
                    break
                kept.append(line + "\n")
            write_atomically(path, "".join(kept))
        self._tensorboard = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1 if step else None)
        self._clock = time.perf_counter()

    # --- numbers ---

    def add(self, terms: Terms, grad_norm: Tensor) -> None:
        """Add a step to the interval's sums; nothing waits for the device."""
        raw, equal, unequal = terms.raw, terms.equal, ~terms.equal
        du_dt = terms.du_dt.square().flatten(1).mean(1)  # of the last samples of the batch, or all
        values = {
            "steps": torch.ones((), device=raw.device),
            "samples": torch.full((), float(len(raw)), device=raw.device),
            "unequal_samples": unequal.sum(),
            "loss": terms.loss.detach(),
            "raw": raw.sum(),
            "raw_equal": torch.where(equal, raw, 0).sum(),
            "raw_unequal": torch.where(unequal, raw, 0).sum(),
            "v_loss": terms.v_loss.sum(),
            "weight": terms.weight.sum(),
            "du_dt": torch.where(unequal[len(raw) - len(du_dt) :], du_dt, 0).sum(),
            "grad_norm": grad_norm.detach(),
        }
        for name, value in values.items():
            value = value.double()
            self._sums[name] = value if name not in self._sums else self._sums[name] + value

    def sums(self) -> dict[str, Tensor]:
        """The unfinished interval, for the checkpoint."""
        return self._sums

    def restore_sums(self, sums: dict[str, Tensor]) -> None:
        """Continue a checkpoint's interval."""
        self._sums = dict(sums)

    def write(self, step: int, epoch: float, lr: float) -> dict:
        """Write the interval's means and start a new one; returns the row. raw sums over a sample's elements."""
        s = {name: float(value) for name, value in self._sums.items()}
        self._sums = {}
        equal = s["samples"] - s["unequal_samples"]
        now = time.perf_counter()
        row = {
            "step": step,
            "epoch": epoch,
            "loss": s["loss"] / s["steps"],
            "raw": s["raw"] / s["samples"],
            "raw_equal": s["raw_equal"] / equal if equal else None,
            "raw_unequal": s["raw_unequal"] / s["unequal_samples"] if s["unequal_samples"] else None,
            "v_loss": s["v_loss"] / s["samples"],
            "weight": s["weight"] / s["samples"],
            "du_dt_rms": (s["du_dt"] / s["unequal_samples"]) ** 0.5 if s["unequal_samples"] else None,
            "grad_norm": s["grad_norm"] / s["steps"],
            "lr": lr,
            "images_per_second": s["samples"] / (now - self._clock),
            "time": time.time(),
        }
        self._clock = now
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if value is not None and name not in ("step", "time"):
                    self._tensorboard.add_scalar(f"train/{name}", value, step)
        except OSError as error:
            raise self._unwritable(error) from None
        return row

    def picture(self, step: int, images: Tensor, columns: int) -> None:
        """Write a grid of uint8 samples."""
        picture = grid(images, columns)
        try:
            save_png(self.out / "samples" / f"step_{step:08d}.png", picture, zoom=max(1, 32 // images.shape[-1]))
            self._tensorboard.add_image("samples/one_step", picture.numpy(), step, dataformats="HWC")
        except OSError as error:
            raise self._unwritable(error) from None

    def flush(self) -> None:
        """Hand everything written to the operating system."""
        try:
            self._tensorboard.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"out: got {self.out}, which cannot be written ({error}), wanted room in a writable folder; make room and "
            "repeat the command to resume"
        )


def write_atomically(path: Path, text: str) -> None:
    """The whole new text or the old one, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
