"""Write the weights of a run as one safetensors file, to sample from, to evaluate and to publish."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .. import cli
from ..errors import require
from ..interop.formats import home
from ..interop.weights import load_checkpoint
from ..storage.checkpoint import save_weights


@dataclass(frozen=True)
class Options:
    checkpoint: Positional[Path]
    """A run folder, whose last checkpoint is taken, a checkpoint, exported weights, or a folder of a saved pipeline."""
    out: Path | None = None
    """The file (default: beside the checkpoint, stepN_WEIGHTS.safetensors)."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, which samples better, or the weights in training."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="export.py", description=__doc__)
    weights, config, path, step = load_checkpoint(options.checkpoint, options.weights)
    out = options.out or home(path) / f"step{step}_{options.weights}.safetensors"
    require(not out.exists(), "out", str(out), "a file that does not exist yet", "name another by --out")
    save_weights(out, weights, config, step)
    print(f"{out}: {sum(x.numel() for x in weights.values()) / 1e6:.1f} M numbers of step {step}")


run = partial(cli.run, main)
