"""Sweep one axis of the paper's ablations on digits: three seeds a row, table and picture beside the paper's numbers.

python scripts/ablate.py tangent          Table 1b
axes: share (1a) tangent (1b) embedding (1c) sampler (1d) weight (1e) omega (1f) kappa (Table 5) precision (ours)
"""

import startup  # noqa: F401  (first: it finds the environment)

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from meanflow import cli
from meanflow.ablation import SEEDS, STEPS, sweep


@dataclass(frozen=True)
class Options:
    axis: Positional[str]
    """share, tangent, embedding, sampler, weight, omega, kappa or precision."""
    steps: int = STEPS
    """Training steps a run."""
    seeds: tuple[int, ...] = SEEDS
    """Seeds of each row."""
    out: Path = Path("runs/ablations")
    """Each axis gets a folder in it. Runs that are done are not repeated."""


def main(args: list[str]) -> int:
    options = cli.parse(Options, args, prog="ablate.py", description=__doc__)
    code = sweep(options.axis, options.out, options.steps, options.seeds)
    if code == 0:
        folder = options.out / options.axis
        print((folder / "table.md").read_text())
        print(folder / "picture.png")
    return code


if __name__ == "__main__":
    cli.run(main)
