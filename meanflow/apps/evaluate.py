"""Judge a trained model: FID, sFID, Inception Score, precision and recall by named protocols;
digits and Fashion-MNIST by a classifier.

Several GPUs: torchrun --nproc-per-node 8 scripts/evaluate.py RUN ... Repeating an interrupted command continues it.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from .. import cli
from ..config import RunConfig
from ..data.decoder import make_decoder
from ..evaluation.classifier import ClassifierJudge
from ..evaluation.evaluator import Plan, Sampler, evaluate, table
from ..evaluation.features import Extractor, digest
from ..evaluation.fid_reference import Sources
from ..evaluation.protocols import named
from ..interop.formats import home
from ..interop.weights import Network, load_ema
from ..method.guidance import sampling_guidance
from ..method.sampling import check_times, even_times
from ..world import World


@dataclass(frozen=True)
class Judging:
    """What the commands that judge a trained model ask alike."""

    checkpoint: Positional[Path]
    """A run folder, whose last checkpoint is taken, a checkpoint, exported weights, or a folder of a saved pipeline."""
    inception: Path | None = None
    """Weights of the FID's network, pt_inception-2015-12-05-6726825d.pth. Without it digits and Fashion-MNIST are
    judged by a classifier of their own."""
    sources: Annotated[Sources, arg(name="")] = Sources()
    vae: str = ""
    """The autoencoder to decode with, instead of the run's."""
    data: str = ""
    """The folder of Fashion-MNIST, instead of the run's."""
    seed: int = 0
    """Seed of the noise and the labels (and of that classifier)."""
    batch: int = 64
    """Samples generated at a time by each process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the model's matrix products. Features and scores are in fp32 and fp64 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def load(self, device: torch.device) -> tuple[Network, RunConfig, Path, int]:
        """:func:`load_ema` of the checkpoint, with the precision, autoencoder and data that are asked for."""
        net, config, path, step = load_ema(self.checkpoint, device)
        if self.precision == "bf16":
            net.compute_dtype = torch.bfloat16
        data = replace(config.data, vae=self.vae or config.data.vae, path=self.data or config.data.path)
        return net, replace(config, data=data), path, step

    def by_classifier(self, config: RunConfig) -> bool:
        """Whether the data's own classifier judges, for want of the FID's network."""
        return config.data.in_pixels and self.inception is None

    def settings(self, net: Network, step: int) -> dict:
        """What all scores depend on, for the record by which a command is continued."""
        return {"step": step, "weights_sha256": digest(net), "seed": self.seed, "precision": self.precision}


@dataclass(frozen=True)
class Options(Judging):
    steps: tuple[int, ...] = (1,)
    """Evaluations of the network per image, evenly spaced in time; several numbers are measured in turn."""
    times: tuple[float, ...] = ()
    """A schedule of one's own instead, falling from 1 to 0."""
    guidance: tuple[float, ...] = ()
    """What a network that is told of its guidance is told: omega, and where guidance begins and ends (default: the
    run's evaluation.guidance, else the official best of its size in one step; of XL/2 in two steps it is 4 0.36 0.64;
    sweep.py finds a run's own)."""
    count: int = 50_000
    """Number of samples for each schedule and choice of labels."""
    protocols: tuple[str, ...] = ("official",)
    """official balanced round floor pytorch-fid clean-fid own-data, several joined by +, and improved MeanFlow's
    imf-jax imf-torch imf-adm: measured side by side."""
    dinov2: Path | None = None
    """A folder with facebook/dinov2-large, for the FDD."""
    out: Path | None = None
    """Where features and report are written (default: RUN/evaluation/stepN_seedN_PRECISION, and the guidance)."""
    json: bool = False
    """Print JSON alone."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="evaluate.py", description=__doc__)
    schedules = (check_times(options.times),) if options.times else tuple(even_times(n) for n in options.steps)
    plan = Plan(options.count, schedules, {name: named(name) for name in options.protocols}, options.batch)
    with World(options.device) as world:
        net, config, path, step = options.load(world.device)
        guidance = sampling_guidance(config.model, config.objective, options.guidance or config.evaluation.guidance)
        if options.by_classifier(config):
            if world.is_main:
                about = {"checkpoint": str(path), "step": step} | ({"guidance": guidance} if guidance else {})
                judge = ClassifierJudge(config.data, options.seed)
                judge_pictures(judge, options.json, net, schedules, about, world.device, guidance)
            return
        extractor = Extractor(options.inception, world.device, options.dinov2)
        shape = (net.in_channels, net.input_size, net.input_size)
        decode = make_decoder(config.data, world.device)
        sampler = Sampler(net, decode, shape, config.model.num_classes, options.seed, world.device, guidance)
        vae = None if config.data.in_pixels else config.data.vae
        settings = options.settings(net, step) | {"data": config.data.name, "vae": vae}
        name = f"step{step}_seed{options.seed}_{options.precision}"
        if guidance:
            settings["guidance"] = list(guidance)
            name += "_guidance" + "-".join(f"{x:g}" for x in guidance)
        out = options.out or home(path) / "evaluation" / name
        report = evaluate(sampler, extractor, plan, options.sources.by_kind(), out, settings, world)
        if report is not None:
            print(json.dumps(report, indent=2) if options.json else f"{table(report)}\n{out / 'report.json'}")


def judge_pictures(
    judge: ClassifierJudge,
    as_json: bool,
    net: torch.nn.Module,
    schedules: tuple[tuple[float, ...], ...],
    about: dict,
    device: torch.device,
    guidance: tuple[float, ...],
) -> None:
    """Print a classifier's scores; JSON is an object, or a list of them for several schedules."""
    floor = {"frechet_floor": judge.floor(), "classifier_accuracy_real": judge.accuracy_real}
    results = [
        {**about, "evaluations": len(times) - 1, **judge.score_net(net, device, times, guidance).as_dict(), **floor}
        for times in schedules
    ]
    if as_json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=2))
        return
    for name, value in (item for result in results for item in result.items()):
        print(f"{name:26s} {value:.4g}" if isinstance(value, float) else f"{name:26s} {value}")


run = partial(cli.run, main)
