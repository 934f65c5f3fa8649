"""Train a MeanFlow model. The same command again resumes the run.

python scripts/train.py PRESET [--out FOLDER] [--dry-run] [--SECTION.OPTION VALUE ...]
python scripts/train.py PRESET --help        all options of a preset, explained
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .. import cli
from ..config import RunConfig
from ..config_json import to_dict
from ..errors import require
from ..presets import PRESETS, preset

COMMON = "--out --data.path --train.steps --train.batch --train.precision --train.init --train.save-every --optim.lr \
--objective.omega --objective.kappa --evaluation.every --dry-run"


@dataclass(frozen=True)
class Options:
    config: Annotated[RunConfig, arg(name="")]
    out: Path
    """The run folder. What it holds is continued."""
    dry_run: bool = False
    """Print the whole configuration as JSON and exit."""


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        print("presets:")
        for name, recipe in PRESETS.items():
            also = "" if recipe.fid_unguided is None else f", {recipe.fid_unguided} told not to guide"
            fid = "" if recipe.fid is None else f" (paper: FID {recipe.fid}{also})"
            print(f"  {name:22s} {recipe.summary}{fid}")
        return 0
    name, *overrides = args
    options = cli.parse(
        Options,
        overrides,
        prog=f"train.py {name}",
        description=f"Train the preset {name}. The same command again resumes the run.\n\nCommon: {COMMON}",
        default=Options(preset(name), Path("runs") / name),
    )
    config, warmup = options.config, options.config.optim.warmup_steps
    # a short trial may end within its preset's warm-up, but not within one that the user has set
    ends = warmup <= config.train.steps or warmup == preset(name).optim.warmup_steps
    wanted = f"at most the {config.train.steps} train.steps"
    require(ends, "optim.warmup_steps", warmup, wanted, "lower it, or train longer")
    if options.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return 0
    from torch.distributed.elastic.multiprocessing.errors import record  # torchrun then shows why a process failed

    from ..training.trainer import train  # seconds to import

    return record(train)(config, options.out) or 0


run = partial(cli.run, main)
