"""The training loop: draw, differentiate, step, log, save, in one process or many. Repeating a run resumes it."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..command import stop_on_signal
from ..config import RunConfig
from ..config_json import from_dict, to_dict
from ..data.dataset import Dataset, Order, open_dataset
from ..data.decoder import make_decoder
from ..data.images import to_uint8
from ..draws import Draws
from ..errors import TrainingStopped, UserError
from ..evaluation.judge import make_judge
from ..interop.weights import load_checkpoint
from ..method.guidance import sampling_guidance
from ..method.sampling import generate
from ..method.views import view_of
from ..objectives.build import make_objective
from ..owner import owned
from ..storage import checkpoint as ckpt
from ..world import World
from .draw import draw_flips
from .engine import build_engine, capture_if_possible, fit_threads
from .flops import sample_flops
from .guard import Findings, SpikeGuard
from .messages import StepInputs
from .optim import empty_state_tensors, learning_rate, load_state_tensors, set_learning_rate, state_tensors
from .parallel import full_tensor, runnable
from .prefetch import Prefetcher
from .runlog import RunLog, check_continues, held_config
from .step import Step

GRID_CLASSES, GRID_ROWS = 10, 8
# options that may differ when a run is continued
CONTINUABLE = (
    *(f"train.{name}" for name in (
        "steps", "log_every", "sample_every", "save_every", "keep_last", "keep_every", "compile", "cuda_graph",
        "checkpoint_blocks", "accumulate", "parallel", "shard_size", "wandb", "device",
    )),
    *(f"evaluation.{name}" for name in ("every", "count", "inception", "reference", "guidance")),
    "optim.implementation", "guard.patience", "guard.then", "guard.rollbacks", "data.path", "data.vae",
)  # fmt: skip
# names of files, which each machine may have in another place
OF_A_MACHINE = ("data.path", "data.vae", "train.init", "evaluation.inception", "evaluation.reference")


class Trainer:
    """A run: its networks, optimizer and data, at some step.

    Args:
        config: of the run.
        out: run folder; a run in it is continued.
        world: the processes that train; None: this one alone.

    Raises:
        UserError: for a folder that holds another run, damaged checkpoints, data that does not fit.
    """

    def __init__(self, config: RunConfig, out: Path, world: World | None = None):
        self.world = world or World(config.train.device)
        self.out, self.device = out, self.world.device
        _check_same(config, self.world)

        # the run that the folder holds, which the configuration must continue; nothing is written yet
        self.guidance = sampling_guidance(
            config.model, config.objective, config.evaluation.guidance, "evaluation.guidance"
        )
        held = held_config(out, self.world)
        config = self.config = capture_if_possible(_with_groups(config, held, self.world), self.world)
        if held is not None:
            # options that are newer than the run have their defaults
            check_continues(out, to_dict(from_dict(held)), to_dict(config), CONTINUABLE)
        train = config.train
        self.objective = make_objective(config, self.world.size)
        self.log = RunLog(out, self.world, self.objective, train.wandb)

        # precision and determinism, before anything is computed
        torch.set_float32_matmul_precision(train.matmul)
        if train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(train.deterministic)

        # data, its order, and what of it is this process's
        self.dataset: Dataset = open_dataset(config.data, config.model)
        self.order = Order(len(self.dataset), train.batch, train.seed, config.data.drop_last)
        self.split = self.objective.split
        self.micro_batches = range(self.world.rank, self.split.micro_batches, self.world.size)
        if self.device.type == "cpu":
            fit_threads(config.model, self.objective.batch)

        # networks, optimizer and step; a run that has a checkpoint does not begin with train.init
        begins = train.init and not ckpt.checkpoints(out / ckpt.FOLDER)
        weights = load_checkpoint(Path(train.init))[0] if begins else None
        self.net, self.ema, loss, self.optimizer = build_engine(config, self.world, self.objective, weights)
        self.guard = SpikeGuard(config.guard, self.device, self.objective.watched)
        self.make_step = Step(config, loss, self.optimizer, self.objective, self.guard)
        # for the MFU, which a CPU has none of
        self.flops = sample_flops(config.model) if self.device.type == "cuda" else None
        self.judge = None
        if config.evaluation.every:
            self.judge = make_judge(config, self.guidance, self.dataset, self.world, out / "evaluation" / "reference")

        # last, for it fills all of these: the checkpoint to go on from
        self.step = self.position = 0
        self.checkpointer = ckpt.Checkpointer(out / ckpt.FOLDER, self.world, train.keep_last, train.keep_every)
        self._resume()

    # --- a step ---

    def inputs(self, position: int) -> tuple[StepInputs, ...]:
        """Data, draws and plan of each of this process's micro-batches, on the host: a plan decides a step's shapes."""
        config, seed, objective, inputs = self.config, self.config.train.seed, self.objective, []
        for micro_batch in self.micro_batches:
            samples = self.split.samples(micro_batch)
            flip = draw_flips(Draws(seed, position, samples)) if config.data.flip else None
            batch = self.dataset.read(self.order.indices(position)[samples.numpy()], flip)
            drawn, others = objective.drawn(seed, position, micro_batch), ()
            if config.train.cuda_graph and self.world.size > 1:
                # one captured step runs in all processes: it has the largest size that any of them needs at this turn
                first = micro_batch - self.world.rank
                others = (objective.drawn(seed, position, first + rank) for rank in range(self.world.size))
            plan, needed = objective.plan(drawn, *others), objective.sizes(drawn, exact=True)
            inputs.append(StepInputs(batch, samples, torch.tensor(position), drawn, plan, needed))
        return tuple(inputs)

    def train_step(self, micro_batches: tuple[StepInputs, ...]) -> None:
        """Make one optimizer step, unless the guard skips it."""
        set_learning_rate(self.optimizer, self.rate(self.step))
        passes = (self.objective.passes(inputs.needed) for inputs in micro_batches)
        flops = sum(map(self.flops.of_passes, passes)) if self.flops else 0.0
        self.log.add(self.make_step(*(inputs.to(self.device) for inputs in micro_batches)), flops)
        self.step += 1
        self.position += 1

    # --- the run ---

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until stop() is true in any process; returns whether the end was reached.

        Raises:
            TrainingStopped: after too many skipped steps in a row.
        """
        train = self.config.train
        look = dict(unit="img", unit_scale=True, mininterval=1.0, dynamic_ncols=True, disable=not self.world.is_main)
        bar = tqdm(desc=self.out.name, total=train.steps * train.batch, initial=self.step * train.batch, **look)
        first, start = self.step, time.perf_counter()
        with bar, Prefetcher(self.inputs, self.position, pin=self.device.type == "cuda") as data:
            while self.step < train.steps and not self.world.poll_stop(stop()):
                # one optimizer step on data that a thread has prepared
                self.train_step(data.get(self.position))
                if self.step == first + 1:
                    self._say_first_step(time.perf_counter() - start)
                bar.update(train.batch)

                # the log, which waits for the device; there a run of bad steps is seen, and may take the run back
                if self._due(train.log_every):
                    self._write_log(bar, data.wait_seconds)
                    if self._went_back():
                        bar.n = self.step * train.batch
                        continue

                # one-step samples, scores, checkpoint
                if self._due(train.sample_every):
                    self.draw_picture()
                if self.judge is not None and self._due(self.config.evaluation.every):
                    self.log.scores(self.step, self.judge(self._sampled()))
                if self._due(train.save_every):
                    self.save()

        # a stopped run saves where it is
        if self.step < train.steps:
            self.save()
        self.checkpointer.wait()
        return self.step == train.steps

    def _due(self, every: int) -> bool:
        """Whether to do something after this step: every so many steps, and after the last."""
        return self.step % every == 0 or self.step == self.config.train.steps

    def _write_log(self, bar: tqdm, waited: float) -> None:
        epoch, rate = self.order.epoch(self.position), self.rate(self.step - 1)
        row = self.log.write(self.step, epoch, rate, waited, ema_distance=self.ema_distance())
        figure = next(iter(self.objective.watched))
        if row[figure] is not None:
            bar.set_postfix_str(f"{figure} {row[figure]:.4g}")
        if row["skipped"]:
            found = self.guard.findings()
            self.log.event(self.step, f"{row['skipped']} step(s) left out, {found.reason()}", total=found.skipped)

    def _say_first_step(self, seconds: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world.is_main:
            compiling = self.make_step.compile_seconds
            of_it = f", {compiling:.1f} s of it compiling" if compiling else ""
            tqdm.write(f"{self.out}: first step after {seconds:.1f} s{of_it}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config.optim, step)

    @torch.no_grad()
    def ema_distance(self) -> float:
        """How far the average is from the weights, relative to them: ||ema - net|| / ||net||."""
        distance = size = 0
        for a, b in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            distance += full_tensor((a - b).square().sum()).double()
            size += full_tensor(b.square().sum()).double()
        return float((distance / size).sqrt())

    def _went_back(self) -> bool:
        """Go back to a checkpoint after too many skipped steps in a row, if configured; waits for the device.

        Raises:
            TrainingStopped: if the run may not go back, or not once more.
        """
        config, found = self.config.guard, self.guard.findings()
        if found.in_a_row < config.patience:
            return False
        self.checkpointer.wait()
        good = ckpt.last_good(self.out / ckpt.FOLDER, self.world, until=found.first)
        if config.then == "stop" or good is None or found.rollbacks >= config.rollbacks:
            raise TrainingStopped(self._explain(found, good))
        reached = self.position
        self._restore(good)
        self.position = reached
        self.guard.went_back(found)
        self.log.start(to_dict(self.config), self.step)
        self.log.event(self.step, f"back here from position {reached}, on with new data", reason=found.reason())
        return True

    def _explain(self, found: Findings, good: Path | None) -> str:
        indices = self.order.indices(found.first)
        return (
            f"loss or gradient: {found.in_a_row} steps in a row left out ({found.reason()}), from position "
            f"{found.first} on (seed {self.config.train.seed}, its data {indices[0]}, {indices[1]} ... {indices[-1]}); "
            f"last good checkpoint: {good or 'none'}; lower optim.lr or train in fp32, in a new folder, or go on from "
            "the checkpoint by --guard.then rollback"
        )

    def draw_picture(self) -> None:
        """Log one-step samples of the averaged weights, one column per class; without a decoder, say so and go on."""
        sharded = self.config.train.parallel != "ddp" and self.world.size > 1
        if not (sharded or self.world.is_main):  # shards are gathered by all processes
            return
        try:
            decode = self._decoder()
        except UserError as error:
            if self.world.is_main:
                tqdm.write(f"{self.out}: no pictures of samples: {error}")
            return
        count = GRID_CLASSES * GRID_ROWS
        draws = Draws(self.config.train.seed, 0, torch.arange(count, device=self.device))
        labels = torch.arange(count, device=self.device) % min(GRID_CLASSES, self.config.model.num_classes)
        latents = generate(self._sampled(), draws, self.dataset.shape, labels, guidance=self.guidance)
        if self.world.is_main:
            names = self.dataset.classes
            captions = [names[i] if names else str(i) for i in labels.tolist()]
            self.log.picture(self.step, to_uint8(decode(latents)).cpu(), captions, GRID_CLASSES)

    def _sampled(self) -> nn.Module:
        """The averaged weights as sampling takes them (a collective call where they are sharded)."""
        return view_of(self.config.objective, runnable(self.ema))

    @cache  # noqa: B019, a trainer lives as long as its process
    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return make_decoder(self.config.data, self.device)

    # --- checkpoints ---

    def _tensors(self) -> dict[str, Tensor]:
        """The run's tensors by name, except the optimizer's; loading fills them in place."""
        tensors = {f"model.{name}": x for name, x in self.net.state_dict().items()}
        tensors |= {f"ema.{name}": x for name, x in self.ema.state_dict().items()}
        return tensors | {f"guard.{name}": x for name, x in self.guard.state().items()}

    def save(self) -> None:
        """Write a checkpoint in the background; an error of the previous one is raised here."""
        self.log.flush()
        tensors = self._tensors() | {"log.sums": self.log.gathered_sums()}
        tensors |= {f"optimizer.{name}": x for name, x in state_tensors(self.optimizer, self.net).items()}
        self.checkpointer.save(self.step, to_dict(self.config), self.position, tensors)

    def _resume(self) -> None:
        self.checkpointer.clear()
        found = ckpt.last_good(self.out / ckpt.FOLDER, self.world)
        if found is not None:
            self._restore(found)
        self.log.start(to_dict(self.config), self.step, self.dataset.classes)
        if self.step < self.config.train.steps:
            self.log.record_start(self.step)

    def _restore(self, path: Path) -> None:
        header = ckpt.read_header(path)
        if header.step > self.config.train.steps:
            raise UserError(
                f"train.steps: got {self.config.train.steps}, wanted at least the {header.step} already done "
                f"in {self.out}; raise it, or name another folder by --out"
            )
        optimizer, tensors = empty_state_tensors(self.net), self._tensors() | {"log.sums": self.log.gathered_sums()}
        ckpt.load(path, tensors | {f"optimizer.{name}": x for name, x in optimizer.items()}, self.world)
        load_state_tensors(self.optimizer, self.net, optimizer)
        # loading weights renews their low-precision copies
        self.net.load_state_dict(self.net.state_dict())
        self.log.restore_sums(tensors["log.sums"])
        self.step, self.position = header.step, header.position


def train(config: RunConfig, out: Path) -> int:
    """Train a run to its end, resuming what the folder holds; returns 0, or 128 + the signal that stopped it.

    Raises:
        UserError: if another process trains in the folder, and as :class:`Trainer`. A refused run leaves nothing.
    """
    with World(config.train.device) as world, stop_on_signal() as received, ExitStack() as stack:
        world.agree(lambda: stack.enter_context(owned(out)), main_only=True)
        trainer = Trainer(config, out, world)
        # before the world ends, which waits for them
        stack.callback(trainer.make_step.drop_graphs)
        code = _train(trainer, received)
        trainer.log.close()
    return code


def train_all(runs: dict[Path, RunConfig]) -> int:
    """Train the run of each folder; those that are done are not repeated.

    Returns:
        0, or the exit code of a training that a signal stopped.
    """
    for folder, config in runs.items():
        code = train(config, folder)
        if code:
            return code
    return 0


def _train(trainer: Trainer, received: list[int]) -> int:
    def say(text: str) -> None:
        if trainer.world.is_main:
            print(f"{trainer.out}: {text}", flush=True)

    if trainer.step == trainer.config.train.steps:
        say(f"finished at step {trainer.step}")
        return 0
    if trainer.step:
        say(f"resuming from step {trainer.step}")
    steps, warmup = trainer.config.train.steps, trainer.config.optim.warmup_steps
    if steps < warmup:
        reached = f"the rate reaches {steps / warmup:.0%} of optim.lr"
        say(f"train.steps {steps} end within optim.warmup_steps {warmup}: {reached}")
    start, first = time.perf_counter(), trainer.step
    finished = trainer.run(lambda: bool(received))
    seconds = time.perf_counter() - start
    images = (trainer.step - first) * trainer.config.train.batch
    state = "finished" if finished else "stopped and saved"
    say(f"{state} at step {trainer.step}, {images / max(seconds, 1e-9):.0f} img/s in {seconds:.0f} s")
    # the signal may have reached another process alone
    return 0 if finished else 128 + (received[0] if received else signal.SIGTERM)


def _check_same(config: RunConfig, world: World) -> None:
    """Raise, in all processes, if they were started with different options."""
    first, *others = world.gather(to_dict(config))
    for rank, other in enumerate(others, 1):
        for section, options in other.items():
            for name, value in options.items():
                option, wanted = f"{section}.{name}", first[section].get(name)
                if value != wanted and option not in OF_A_MACHINE:
                    raise UserError(
                        f"{option}: got {value!r} in process {rank}, wanted {wanted!r}, as in process 0; start all "
                        "with the same options"
                    )


def _with_groups(config: RunConfig, held: dict | None, world: World) -> RunConfig:
    """The configuration with its number of groups: its own, else that of the run it continues, else one a process."""
    groups = config.train.groups or (held or {}).get("train", {}).get("groups") or world.size
    return replace(config, train=replace(config.train, groups=groups))
