"""A local web page to sample from a model: classes, steps and seed in, a grid of images and its time out."""

import startup  # noqa: F401  (first: it finds the environment)

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from meanflow import cli, page
from meanflow.world import choose_device


@dataclass(frozen=True)
class Options:
    checkpoint: Positional[Path]
    """A run folder, a checkpoint, exported weights, or a folder of a saved pipeline."""
    names: str = ""
    """Names of the classes: "imagenet", a JSON file {number: name}, or a file with a name a line."""
    vae: str = ""
    """Decoder of the latents, a local folder or its name (default: the one that the run's configuration names)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""
    host: str = "127.0.0.1"
    """Address to listen at; this one is this machine alone. There is no password."""
    port: int = 7860
    """0 takes a free one."""


def main(args: list[str]) -> None:
    options = cli.parse(Options, args, prog="page.py", description=__doc__)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    studio = page.load(options.checkpoint, choose_device(options.device), dtype, options.names, options.vae)
    page.serve(studio, options.host, options.port)


if __name__ == "__main__":
    cli.run(main)
