"""Convert weights: to a diffusers pipeline, to a file to start training from, or to the formats of others."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .. import cli
from ..errors import require
from ..interop import convert


@dataclass(frozen=True)
class Options:
    source: Positional[Path]
    """A run folder or checkpoint, a pipeline, a checkpoint of the official code (flax), or a file of tensors (.pt)."""
    to: Literal["pipeline", "weights", "official", "imf", "zhuyu"] = "pipeline"
    """A folder for MeanFlowPipeline.from_pretrained; one safetensors file, to start training from and to evaluate; a
    checkpoint of the official code (MeanFlow's or improved MeanFlow's); a .pth of improved MeanFlow's official PyTorch
    code, to sample from; a .pt of zhuyu-cs/MeanFlow."""
    out: Path | None = None
    """Where to write: a folder for a pipeline, else a file."""
    format: Literal["auto", "run", "pipeline", "official", "imf", "sit", "dit", "zhuyu"] = "auto"
    """Format of the source. .pt files of SiT, DiT and zhuyu-cs/MeanFlow look alike: name theirs, and imf's .pth too."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average, which samples better, or the weights in training."""
    vae: str = ""
    """A pipeline's autoencoder, a local folder or its name; without one the pipeline gives latents (or digits)."""
    names: str = ""
    """Names of the classes for a pipeline: "imagenet" (ILSVRC 2012), a JSON file {number: name}, or a name a line."""
    scores: Path | None = None
    """A report.json of evaluate.py, for the model card."""
    num_heads: int | None = None
    """Attention heads, where the network is of no official size."""
    input_size: int | None = None
    """Height and width of the latents, where the source does not tell (default: 32)."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="convert.py", description=__doc__)
    require(options.source.exists(), "source", str(options.source), "a file or folder that is there", "check the path")
    require(options.out is not None, "out", None, "where to write", "name it by --out")
    require(not options.out.exists(), "out", str(options.out), "what does not exist yet", "name another by --out")
    weights = convert.load(
        options.source, options.format, options.weights, num_heads=options.num_heads, input_size=options.input_size
    )
    if options.to == "pipeline":
        names = convert.read_names(options.names, weights.model.num_classes) if options.names else None
        scores = convert.read_scores(options.scores) if options.scores else None
        pipeline = convert.make_pipeline(weights, options.vae, names, scores)
        convert.save_pipeline(pipeline, options.out)
        if pipeline.vae is None and weights.model.in_channels not in (1, 3):
            print("Without an autoencoder the pipeline gives latents; --vae FOLDER adds one.")
    else:
        save = {
            "weights": convert.save_start,
            "official": convert.save_official,
            "imf": convert.save_imf,
            "zhuyu": convert.save_zhuyu,
        }
        save[options.to](weights, options.out)
    count = sum(x.numel() for x in weights.tensors.values()) / 1e6
    print(f"{options.out}: {weights.model.name}, {count:.1f} M numbers of step {weights.step} from {weights.origin}")
    if weights.note:
        print(weights.note)


run = partial(cli.run, main)
