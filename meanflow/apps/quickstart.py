"""One-step generation of handwritten digits, trained here, beside flow matching with the same budget."""

import json
import shlex
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from .. import cli
from ..config import RunConfig
from ..presets import FLOW_MATCHING, preset


@dataclass(frozen=True)
class Options:
    config: Annotated[RunConfig, arg(name="")]
    out: Path = Path("runs/quickstart")
    """Where everything goes. A finished run reprints its report; another configuration goes to a folder beside it."""


def following(out: Path) -> list[str]:
    """Commands to try next."""
    run = shlex.quote(str(out / "meanflow"))
    return [
        f"python scripts/sample.py {run} --steps 2 --labels 3 5 --count 20",
        f"python scripts/page.py {run}",
        f"python scripts/convert.py {run} --out {shlex.quote(str(out / 'pipeline'))}",
    ]


def main(args: list[str]) -> int:
    options = cli.parse(Options, args, prog="quickstart", description=__doc__, default=Options(preset("digits")))
    from ..apps.comparison import compare, folder_of, report_lines  # seconds to import

    start = time.perf_counter()
    with folder_of(options.out, options.config) as out:
        report = out / "report.json"
        if not report.exists():
            flow_matching = replace(options.config, objective=replace(options.config.objective, **FLOW_MATCHING))
            code = compare({"meanflow": options.config, "flow_matching": flow_matching}, out)
            if code:
                return code
    print("\n".join(report_lines(json.loads(report.read_text()))))
    print(f"\n{out / 'samples.png'}   {out / 'report.md'}   {report}   ({time.perf_counter() - start:.0f} s)")
    print("\nNext:\n" + "\n".join(f"    {line}" for line in following(out)))
    return 0


run = partial(cli.run, main)
