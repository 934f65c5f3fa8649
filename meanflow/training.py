"""The training loop of one process: draw, differentiate, step, log, save. Repeating a run resumes it."""

import copy
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint as ckpt
from .config import ModelConfig, RunConfig, from_dict, to_dict
from .data import Dataset, Order, open_dataset
from .dit import DiT
from .draws import Draws, Stream
from .errors import TrainingStopped, UserError
from .images import make_decoder, to_uint8
from .objective import MeanFlowLoss, drop_mask
from .optim import learning_rate, load_state_tensors, make_optimizer, set_learning_rate, state_tensors
from .plan import Planner
from .runlog import RunLog
from .sampling import sample
from .step import Inputs, Step, compile_loss
from .times import draw_times

GRID_CLASSES, GRID_ROWS = 10, 8
# what may change between a run and its continuation
CONTINUABLE = ("train.steps", "train.log_every", "train.sample_every", "train.save_every", "train.keep_last",
               "train.compile", "train.cuda_graph", "train.checkpoint_blocks", "optim.implementation")  # fmt: skip


def build_net(config: ModelConfig, compute_dtype: torch.dtype | None = None, *, checkpoint_blocks: bool = False) -> DiT:
    """The network of a configuration."""
    return DiT(
        input_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        time_embedding=tuple(config.time_embedding.split(",")),
        compute_dtype=compute_dtype,
        checkpoint_blocks=checkpoint_blocks,
    )


def choose_device(name: str) -> torch.device:
    """The device of "auto", "cpu" or "cuda".

    Raises:
        UserError: for a GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: got 'cuda', but torch sees no GPU, wanted one; take auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Trainer:
    """A run: its networks, optimizer and data, at some step.

    Args:
        config: of the run.
        out: run folder. What it holds is continued.

    Raises:
        UserError: for a folder that holds another run, a damaged checkpoint, data that does not fit.
    """

    def __init__(self, config: RunConfig, out: Path):
        self.config, self.out = config, out
        self.device = choose_device(config.train.device)
        torch.set_float32_matmul_precision(config.train.matmul)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(config.train.deterministic)
        self.dataset: Dataset = open_dataset(config.data, config.model)
        self.order = Order(len(self.dataset), config.train.batch, config.train.seed, config.data.drop_last)

        compute_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        net = build_net(config.model, compute_dtype, checkpoint_blocks=config.train.checkpoint_blocks)
        net.init_weights(torch.Generator().manual_seed(config.train.seed))
        self.net = net.to(self.device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.optimizer = make_optimizer(
            config.optim, self.net, self.ema, copies=compute_dtype is not None, captured=self._captured
        )
        self.planner = Planner(config.objective, config.train.batch)
        guide = self.ema if config.objective.guidance_weights == "ema" else None
        loss = MeanFlowLoss(config.objective, self.net, guide)
        if config.train.compile:
            compile_loss(loss)
        self.make_step = Step(config, loss, self.optimizer, self.planner)
        self.step = 0
        self.first_bad = torch.tensor(-1, device=self.device)
        self.last_checkpoint: Path | None = None
        self.log = RunLog(out)
        self._resume()

    # --- a step ---

    def inputs(self, step: int) -> Inputs:
        """What a step computes with: data, draws and plan of this process's samples."""
        config, samples = self.config, torch.arange(self.config.train.batch)
        # on the host: the plan decides the shapes of what the device does
        draws = Draws(config.train.seed, step, samples)
        r, t = draw_times(config.objective, draws)
        drop = drop_mask(config.objective, draws.uniform(Stream.LABEL_DROP))
        batch = self.dataset.read(self.order.indices(step))
        plan = self.planner.plan(r, t, drop)
        return Inputs(batch, samples, torch.tensor(step), r, t, drop, plan).to(self.device)

    def train_step(self) -> None:
        """One optimizer step."""
        set_learning_rate(self.optimizer, self.rate(self.step))
        terms, grad_norm = self.make_step(self.inputs(self.step))
        bad = ~(torch.isfinite(terms.raw).all() & torch.isfinite(grad_norm))
        self.first_bad = torch.where((self.first_bad < 0) & bad, self.step, self.first_bad)
        self.log.add(terms, grad_norm)
        self.step += 1

    # --- the run ---

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step, or until stop() says so; whether the end was reached.

        Raises:
            TrainingStopped: for a loss or gradient that is not finite.
        """
        train = self.config.train
        bar = tqdm(total=train.steps * train.batch, initial=self.step * train.batch, unit="img", unit_scale=True,
                   desc=self.out.name, mininterval=1.0, dynamic_ncols=True)  # fmt: skip
        first, start = self.step, time.perf_counter()
        with bar:
            while self.step < train.steps and not stop():
                self.train_step()
                if self.step == first + 1:
                    self._say_first_step(time.perf_counter() - start)
                bar.update(train.batch)
                done = self.step == train.steps
                if self.step % train.log_every == 0 or done:
                    self.check_finite()
                    row = self.log.write(self.step, self.order.epoch(self.step), self.rate(self.step - 1))
                    bar.set_postfix_str(f"raw {row['raw']:.4g}")
                if self.step % train.sample_every == 0 or done:
                    self.draw_picture()
                if self.step % train.save_every == 0 or done:
                    self.save()
        if self.step < train.steps:
            self.save()
        return self.step == train.steps

    def _say_first_step(self, seconds: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        compiling = self.make_step.compile_seconds
        tqdm.write(
            f"{self.out}: first step after {seconds:.1f} s" + f", {compiling:.1f} s of it compiling" * (compiling > 0)
        )

    @property
    def _captured(self) -> bool:
        graphs = self.config.train.cuda_graph
        if graphs and self.device.type != "cuda":
            raise UserError(
                "train.cuda_graph: got True, wanted a GPU to capture on; set it False, or train.device cuda"
            )
        return graphs

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config.optim, step)

    def check_finite(self) -> None:
        """Raise if a loss or gradient was not finite. Waits for the device."""
        step = int(self.first_bad)
        if step < 0:
            return
        batch = self.config.train.batch
        indices = self.order.indices(step)
        raise TrainingStopped(
            f"loss or gradient: not finite at step {step} (seed {self.config.train.seed}, draws of samples "
            f"0 to {batch - 1} of step {step}, data {indices[0]}, {indices[1]} ... {indices[-1]}); last good "
            f"checkpoint: {self.last_checkpoint or 'none'}; lower optim.lr or train in fp32, in a new folder"
        )

    def draw_picture(self) -> None:
        """Log one-step samples of the averaged weights, a column a class; without a decoder, say so and go on."""
        try:
            decode = self._decoder()
        except UserError as error:
            print(f"{self.out}: no pictures of samples: {error}")
            return
        count = GRID_CLASSES * GRID_ROWS
        draws = Draws(self.config.train.seed, 0, torch.arange(count, device=self.device))
        noise = draws.normal(Stream.NOISE, self.dataset.shape)
        labels = torch.arange(count, device=self.device) % min(GRID_CLASSES, self.config.model.num_classes)
        images = to_uint8(decode(sample(self.ema, noise, labels)))
        self.log.picture(self.step, images.cpu(), GRID_CLASSES)

    @cache  # noqa: B019, a trainer lives as long as its process
    def _decoder(self) -> Callable[[Tensor], Tensor]:
        return make_decoder(self.config.data, self.device)

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint, unless the last step's numbers are not finite."""
        self.check_finite()
        if self.last_checkpoint is not None and self.last_checkpoint.name == f"step_{self.step:08d}.safetensors":
            return
        tensors = {f"model.{name}": x for name, x in self.net.state_dict().items()}
        tensors |= {f"ema.{name}": x for name, x in self.ema.state_dict().items()}
        tensors |= {f"optimizer.{name}": x for name, x in state_tensors(self.optimizer, self.net).items()}
        tensors |= {f"log.{name}": x for name, x in self.log.sums().items()}
        state = ckpt.Checkpoint(self.step, to_dict(self.config), tensors)
        self.log.flush()
        self.last_checkpoint = ckpt.save(self.out / "checkpoints", state, self.config.train.keep_last)

    def _resume(self) -> None:
        self.log.check(to_dict(self.config), CONTINUABLE)
        found = ckpt.checkpoints(self.out / "checkpoints")
        if found:
            self._restore(found[-1])
        self.log.start(to_dict(self.config), self.step)

    def _restore(self, path: Path) -> None:
        state = ckpt.load(path)
        load_weights(self.net, state.part("model"), path)
        load_weights(self.ema, state.part("ema"), path)
        try:
            load_state_tensors(self.optimizer, self.net, state.part("optimizer"))
        except KeyError as error:
            raise UserError(
                f"checkpoint: got {path}, which lacks {error} of the optimizer, wanted one of this run; delete it"
            ) from None
        if state.step > self.config.train.steps:
            raise UserError(
                f"train.steps: got {self.config.train.steps}, wanted at least the {state.step} already done "
                f"in {self.out}; raise it, or name another folder by --out"
            )
        self.step, self.last_checkpoint = state.step, path
        self.log.restore_sums(state.part("log"))


def load_weights(net: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Load a checkpoint's weights.

    Raises:
        UserError: where they do not fit the network.
    """
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:24])
        raise UserError(
            f"checkpoint: got {path}, which does not fit the model ({reason} ...), wanted one of this run; name another"
        ) from None


@contextmanager
def stop_on_signal():
    """SIGINT and SIGTERM ask the loop to stop after its step: yields a list that then holds the signal's number."""
    received: list[int] = []

    def note(number, frame):
        received.append(number)
        if len(received) == 1:
            print(f"\n{signal.Signals(number).name}: stopping after this step; a second one stops at once", flush=True)
        else:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: RunConfig, out: Path) -> int:
    """Train a run to its end, resuming what the folder holds; the exit code: 0, or 128 + the signal that stopped it."""
    trainer = Trainer(config, out)
    if trainer.step == config.train.steps:
        print(f"{out}: finished at step {trainer.step}")
        return 0
    if trainer.step:
        print(f"{out}: resuming from step {trainer.step}")
    start, first = time.perf_counter(), trainer.step
    with stop_on_signal() as received:
        finished = trainer.run(lambda: bool(received))
    seconds = time.perf_counter() - start
    images = (trainer.step - first) * config.train.batch
    state = "finished" if finished else "stopped and saved"
    print(f"{out}: {state} at step {trainer.step}, {images / max(seconds, 1e-9):.0f} img/s in {seconds:.0f} s")
    return 0 if finished else 128 + received[0]


def load_ema(path: Path, device: torch.device) -> tuple[DiT, RunConfig, Path, int]:
    """The averaged weights of a checkpoint or of a run folder's last one: network, configuration, file and step.

    Raises:
        UserError: where there is none, or a damaged or foreign one.
    """
    if path.is_dir():
        found = ckpt.checkpoints(path / "checkpoints") or ckpt.checkpoints(path)
        if not found:
            raise UserError(f"checkpoint: got {path}, a folder without any, wanted a run folder; train first")
        path = found[-1]
    state = ckpt.load(path)
    config = from_dict(state.config)
    net = build_net(config.model)
    load_weights(net, state.part("ema"), path)
    return net.to(device).eval().requires_grad_(False), config, path, state.step
