"""Judge a trained model's samples: conditional accuracy, Fréchet distance and within-class variance (digits)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from meanflow import cli
from meanflow.errors import require
from meanflow.digits_evaluation import DigitsEvaluation
from meanflow.sampling import check_times, even_times
from meanflow.training import choose_device, load_ema


@dataclass(frozen=True)
class Options:
    checkpoint: Positional[Path]
    """A run folder, whose last checkpoint is taken, or a checkpoint file."""
    steps: int = 1
    """Evaluations of the network an image, evenly spaced in time."""
    times: tuple[float, ...] = ()
    """A schedule of one's own instead, falling from 1 to 0."""
    seed: int = 0
    """Seed of the classifier and the noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    json: bool = False
    """Print JSON alone."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="evaluate.py", description=__doc__)
    times = check_times(options.times) if options.times else even_times(options.steps)
    device = choose_device(options.device)
    net, config, path, step = load_ema(options.checkpoint, device)
    require(
        config.data.name == "digits", "checkpoint", f"a model of {config.data.name}", "one of digits", "name another"
    )
    judge = DigitsEvaluation(options.seed)
    scores = judge.score_net(net, device, times)
    result = {
        "checkpoint": str(path),
        "step": step,
        "evaluations": len(times) - 1,
        **scores.as_dict(),
        "frechet_floor": judge.floor(),
        "classifier_accuracy_real": judge.accuracy_real,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:26s} {value:.4g}" if isinstance(value, float) else f"{name:26s} {value}")


if __name__ == "__main__":
    cli.run(main)
