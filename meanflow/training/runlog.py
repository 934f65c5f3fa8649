"""The log of a run: configuration, environment, JSON lines and TensorBoard scalars, pictures of samples."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.images import captioned, save_png
from ..errors import UserError, require
from ..interop.formats import CLASSES
from ..method.contract import Objective
from ..storage.record import environment, write_atomically
from ..world import World
from .messages import StepResult
from .peaks import PEAKS

CONFIG = "config.json"


class RunLog:
    """The run folder's log. Sums over the steps of an interval stay on the device until they are written.

    Args:
        out: run folder. world: the processes, whose first one writes.
        objective: says what of its terms is logged. wandb: project of Weights & Biases, or "".
    """

    def __init__(self, out: Path, world: World, objective: Objective, wandb: str = ""):
        self.objective, self._names = objective, objective.sum_names
        self.out, self.world, self._project = out, world, wandb
        if wandb:
            _check_wandb(wandb)
        # on the device, for the sum over the processes
        self.restore_sums(torch.zeros(len(self._names), dtype=torch.float64, device=world.device))
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._clock, self._flops, self._images, self._waited = time.perf_counter(), 0.0, 0, 0.0
        self._cpu_clock = time.process_time()

    def start(self, config: dict, step: int, classes: list[str] | None = None) -> None:
        """Record the configuration and the classes' names, and drop lines after the step from which the run goes on."""
        if not self.world.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / CONFIG, json.dumps(config, indent=2) + "\n")
        if classes:
            names = json.dumps(dict(enumerate(classes)), indent=1, ensure_ascii=False)
            write_atomically(self.out / CLASSES, names + "\n")
        path = self.out / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # half a line, of a run that was killed
                    break
                if row["step"] > step:
                    break
                kept.append(line + "\n")
            write_atomically(path, "".join(kept))
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._tensorboard = SummaryWriter(str(self.out / "tensorboard"), purge_step=step + 1 if step else None)
        if self._project and self._wandb is None:
            self._wandb = self._start_wandb(config)

    def record_start(self, step: int) -> None:
        """Record a start of the run: its step and environment, beside those of earlier starts."""
        if not self.world.is_main:
            return
        path, now = self.out / "environment.json", environment()
        try:
            before = json.loads(path.read_text())
            starts = before.get("starts") or [before]
        except (OSError, json.JSONDecodeError, AttributeError):
            starts = []
        starts.append({"time": time.time(), "step": step, "processes": self.world.size} | now)
        write_atomically(path, json.dumps(now | {"starts": starts}, indent=2) + "\n")

    def _start_wandb(self, config: dict):
        import wandb

        # one run per folder, however often it is resumed
        name = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]
        return wandb.init(
            project=self._project, name=self.out.name, id=name, dir=self.out, config=config, resume="allow"
        )

    def close(self) -> None:
        """Close the loggers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    # --- numbers ---

    def add(self, done: StepResult, flops: float) -> None:
        """Add a step to the interval's sums without waiting for the device; flops: this process's operations in it."""
        share = 1 / (self.world.size * len(done.terms))
        main = float(self.world.is_main)

        def number(value: float) -> Tensor:
            # filled on the device: a copy to a GPU would wait for it
            return torch.full((), value, dtype=torch.float64, device=done.grad_norm.device)

        values = dict.fromkeys(self._names, number(0.0)) | {
            "steps": number(main),
            "grad_norm": done.grad_norm.detach() * main,
        }
        for terms in done.terms:
            for name, value in self.objective.sums(terms).items():
                values[name] = values[name] + value
            values["loss"] = values["loss"] + terms.loss.double() * share
        row = torch.stack([values[name].double() for name in self._names])
        # a skipped step's figures may be NaN: leave them out of the means
        row = torch.where(done.skipped > 0, 0.0, row)
        row[self._names.index("skipped")] = done.skipped * main
        self._sums = self._sums + row
        self._flops += flops
        self._images += self.objective.batch * len(done.terms)

    def gathered_sums(self) -> Tensor:
        """Sum the unfinished interval over all processes, for the checkpoint; the first process then keeps it."""
        total = self.world.sum(self._sums)
        self._sums = total if self.world.is_main else torch.zeros_like(total)
        return total

    def restore_sums(self, sums: Tensor) -> None:
        """Continue with a checkpoint's sums."""
        self._sums = sums if self.world.is_main else torch.zeros_like(sums)

    def write(self, step: int, epoch: float, lr: float, waited: float, **more: float | None) -> dict:
        """Write the interval's means and start a new one; returns the row. All processes call it, the first writes.

        Args:
            waited: seconds that this process has waited for data since the run began. more: further columns.
        """
        s = dict(zip(self._names, self.world.sum(self._sums).tolist(), strict=True))
        self._sums = torch.zeros_like(self._sums)
        now, cpu_now = time.perf_counter(), time.process_time()
        seconds = now - self._clock

        def of_steps(name: str) -> float | None:
            return s[name] / s["steps"] if s["steps"] else None

        row = {
            "step": step,
            "epoch": epoch,
            "loss": of_steps("loss"),
            **self.objective.columns(s),
            "grad_norm": of_steps("grad_norm"),
            "lr": lr,
            "skipped": int(s["skipped"]),
            **more,
            "images_per_second": self._images * self.world.size / seconds,
            "cpu_seconds": cpu_now - self._cpu_clock,
            "data_wait": (waited - self._waited) / seconds,
            "mfu": self._mfu(seconds),
            "memory_gb": _memory_gb(self.world.device),
            "time": time.time(),
        }
        self._clock, self._flops, self._images, self._waited = now, 0.0, 0, waited
        self._cpu_clock = cpu_now
        if self.world.is_main:
            self._write(step, row)
        return row

    def _write(self, step: int, row: dict) -> None:
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            scalars = {f"train/{k}": v for k, v in row.items() if v is not None and k not in ("step", "time")}
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
            if self._wandb is not None:
                self._wandb.log(scalars, step=step)
        except OSError as error:
            raise self._unwritable(error) from None

    def _mfu(self, seconds: float) -> float | None:
        """The recipe's matrix products per second, as a share of this GPU's 16-bit datasheet peak."""
        if self.world.device.type != "cuda":
            return None
        peak = PEAKS.get(torch.cuda.get_device_name(self.world.device))
        return self._flops / seconds / (peak.tflops * 1e12) if peak else None

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Log scores of samples: a line in scores.jsonl, and in the loggers."""
        if not self.world.is_main:
            return
        try:
            with open(self.out / "scores.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **scores}) + "\n")
            for name, value in scores.items():
                self._tensorboard.add_scalar(f"evaluation/{name}", value, step)
            if self._wandb is not None:
                self._wandb.log({f"evaluation/{name}": value for name, value in scores.items()}, step=step)
        except OSError as error:
            raise self._unwritable(error) from None
        tqdm.write(f"{self.out}: step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))

    def event(self, step: int, what: str, **values) -> None:
        """Log an unusual event: a line in events.jsonl and on the terminal."""
        if not self.world.is_main:
            return
        try:
            with open(self.out / "events.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "event": what, **values, "time": time.time()}) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None
        tqdm.write(f"{self.out}: step {step}: {what}")

    def picture(self, step: int, images: Tensor, captions: list[str], columns: int) -> None:
        """Write a grid of uint8 samples with captions; the first process does."""
        if not self.world.is_main:
            return
        picture = captioned(images, captions, columns, zoom=max(1, 32 // images.shape[-1]))
        try:
            save_png(self.out / "samples" / f"step_{step:08d}.png", picture)
            self._tensorboard.add_image("samples/one_step", picture.numpy(), step, dataformats="HWC")
            if self._wandb is not None:
                import wandb

                self._wandb.log({"samples/one_step": wandb.Image(picture.numpy())}, step=step)
        except OSError as error:
            raise self._unwritable(error) from None

    def flush(self) -> None:
        """Hand everything written to the operating system."""
        try:
            if self._tensorboard is not None:
                self._tensorboard.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"out: got {self.out}, which cannot be written ({error}), wanted room in a writable folder; make room and "
            "repeat the command to resume"
        )


def _check_wandb(project: str) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise UserError(
            f"train.wandb: got {project!r}, but its package is not installed, wanted wandb; "
            "pip install wandb, or leave the option out: TensorBoard has the same"
        ) from None


def held_config(out: Path, world: World) -> dict | None:
    """Read the configuration of the run that the folder holds, if any; writes nothing.

    Raises:
        UserError: if the folder holds something else, or cannot be read.
    """
    values = None

    def look():
        nonlocal values
        path = out / CONFIG
        try:
            values = json.loads(path.read_text()) if path.exists() else None
            foreign = None if values else foreign_entry(out)
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"out: got {out}, which cannot be used ({error}), wanted a writable run folder; name another by --out"
            ) from None
        if values is not None and not (isinstance(values, dict) and {"model", "train"} <= values.keys()):
            foreign = CONFIG
        wanted = f"an empty folder or a run's: this one holds {foreign}"
        require(foreign is None, "out", str(out), wanted, "name another by --out")

    world.agree(look, main_only=True)
    return world.broadcast(values)


def check_continues(out: Path, held: dict, config: dict, continuable: tuple[str, ...]) -> None:
    """Raise unless a configuration continues the one that the folder holds."""
    for section, options in config.items():
        for name, value in options.items():
            if f"{section}.{name}" in continuable:
                continue
            before = held.get(section, {}).get(name)
            wanted = f"{before!r}, as in the run that {out} holds"
            hint = "name another folder by --out to start a new run"
            require(before == value, f"{section}.{name}", value, wanted, hint)


def foreign_entry(folder: Path) -> str | None:
    """Find the first entry that is not of a run's start; hidden files and empty folders do not count."""
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        hidden = path.name.startswith(".") or path.suffix == ".partial"
        if not hidden and not (path.is_dir() and not any(path.iterdir())):
            return path.name
    return None


class Cost(NamedTuple):
    """Of a run, from its log."""

    seconds: float
    cpu_seconds: float
    """Of all cores together: about the same where others use them too."""
    images_per_second: float
    """The median."""


def cost_of(run: Path) -> Cost:
    """What a run's training took."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())["train"]
    rates = torch.tensor([row["images_per_second"] for row in rows], dtype=torch.float64)
    steps = torch.tensor([row["step"] for row in rows], dtype=torch.float64).diff(prepend=torch.zeros(1).double())
    cpu_seconds = sum(row.get("cpu_seconds", 0.0) for row in rows)  # older logs have none
    return Cost(float((steps * config["batch"] / rates).sum()), cpu_seconds, float(rates.median()))


def _memory_gb(device: torch.device) -> float | None:
    """Peak memory of this process on its GPU, or its resident memory now, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
