"""The training step that all variants make: what is trained, on which inputs, as the command line asks for it."""

import argparse
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meanflow.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, TrainConfig
from meanflow.data.dataset import Batch
from meanflow.model.build import build_net
from meanflow.objectives.build import make_objective
from meanflow.presets import preset
from meanflow.training.messages import StepInputs

from ..harness import arbiter
from ..harness.arguments import available, finite, positive
from ..harness.rows import objective_columns, objective_words

WEIGHT_STD, GATE_STD = 0.02, 0.5
"""Standard deviations given to weights that start at zero, and to a block's learned gates, which are vectors: so that
every gradient depends on everything."""


@dataclass(frozen=True)
class Workload:
    """What is trained, the same for every variant."""

    run: RunConfig
    device: str

    @classmethod
    def of(
        cls, model: ModelConfig, objective: ObjectiveConfig, data: DataConfig, batch: int, device: str, precision: str
    ) -> "Workload":
        """A network and objective on synthetic latents, scaled as the data's are."""
        train = TrainConfig(steps=1, batch=batch, precision=precision, matmul="high", device=device)
        return cls(RunConfig(model, objective, OptimConfig(), data, train), device)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.run.train.precision == "bf16" else None

    def weights(self) -> dict[str, Tensor]:
        """Initial weights without zeros, on the CPU."""
        return initial_weights(self.run.model, self.device)

    def inputs(self, step: int) -> StepInputs:
        """Latents of the size and scale of the VAE's, with the step's real draws and plan."""
        run, samples = self.run, torch.arange(self.run.train.batch)
        objective, generator = make_objective(run), torch.Generator().manual_seed(step)
        shape = (len(samples), run.model.in_channels, run.model.input_size, run.model.input_size)
        mean = 5 * torch.randn(shape, generator=generator)
        labels = torch.randint(run.model.num_classes, (len(samples),), generator=generator)
        batch = Batch(mean, torch.full_like(mean, 0.1), labels)
        drawn = objective.drawn(0, step, 0)
        inputs = StepInputs(batch, samples, torch.tensor(step), drawn, objective.plan(drawn))
        return inputs.to(torch.device(self.device))


@functools.lru_cache(maxsize=1)
def initial_weights(model: ModelConfig, device: str) -> dict[str, Tensor]:
    """Initial weights of all variants, on the CPU; drawn once on the device, for a CPU is slow at the largest model."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        net = build_net(model)
    net.to_empty(device=device)
    net.init_weights(generator)
    for name, p in net.named_parameters():
        gate = name.rpartition(".")[2].startswith("gate")
        if (p.ndim > 1 or gate) and not p.any():
            nn.init.normal_(p, std=GATE_STD if gate else WEIGHT_STD, generator=generator)
    return {name: x.cpu() for name, x in net.state_dict().items()}


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is trained, where, and which file gets the rows."""
    parser.add_argument("--preset", default=None, help="a recipe's model and objective, instead of those below")
    parser.add_argument("--model", default="XL/2", help="size and patch, for instance B/4 (default XL/2)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument(
        "--input-size", type=int, default=32, help="side of the latents; 64 is ImageNet-512 (default 32)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products and attention")
    parser.add_argument("--omega", type=finite, default=1.0, help="guidance: weight of the sample's velocity")
    parser.add_argument(
        "--kappa", type=finite, default=0.5, help="guidance: weight of u(z,t,t|y); 0 and omega 1 is none"
    )
    parser.add_argument("--interval", type=finite, nargs=2, default=(0.0, 1.0), help="t that is guided (default 0 1)")
    parser.add_argument("--share", type=finite, default=0.25, help="share of r != t (default 0.25)")
    parser.add_argument("--device", type=available, default="cuda", help="cuda (default), or cpu")
    parser.add_argument("--repeats", type=positive, default=None, help="timed steps")
    parser.add_argument("--seconds", type=finite, default=math.inf, help="CPU: fewer steps where they take longer")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    arbiter.add_argument(parser)


def make_workload(options: argparse.Namespace) -> Workload:
    """Make the workload of parsed arguments.

    Raises:
        UserError: for a value out of range.
    """
    arbiter.join(options.turns)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    if options.preset:
        recipe = preset(options.preset)
        model, objective, data = recipe.model, recipe.objective, recipe.data
    else:
        data = DataConfig(name="latents")
        model = ModelConfig.official(options.model, input_size=options.input_size)
        objective = ObjectiveConfig(
            omega=options.omega, kappa=options.kappa, share_equal=1 - options.share,
            guidance_start=options.interval[0], guidance_end=options.interval[1],
        )  # fmt: skip
    return Workload.of(model, objective, data, options.batch, options.device, options.precision)


def identity(work: Workload, preset: str | None = None) -> dict:
    """The columns of a row that say what was trained."""
    model = work.run.model
    return {
        "preset": preset,
        "model": model.name,
        "batch": work.run.train.batch,
        "tokens": model.tokens,
        "precision": work.run.train.precision,
        **objective_columns(work.run.objective),
    }


def title(row: dict) -> str:
    """A line that says what was trained, and where."""
    where = row["gpu"] or f"CPU ({row['cpu']}, {row['threads']} threads)"
    shape = f"{row['model']}, batch {row['batch']}, {row['tokens']} tokens, {row['precision']}"
    return ", ".join([shape, *objective_words(row).values(), where])
