"""Is this tree slower than another revision, or another tree? Both make the same steps in turns, in one run.

python -m benchmarks.regression --base HEAD~1
python -m benchmarks.regression --self-check
python -m benchmarks.regression --base main --device cpu --model S/8 --batch 4 --precision fp32 --variant ours-eager

The other revision is checked out beside this tree and works in a process of its own, as this one does; --base may also
be the folder of a tree with its native libraries, where there is no git. Turns alternate, so that what else the machine
does falls on both; the ratio is the median over the pairs of a turn, with its 20 to 80 % quantiles. Exit code 1 where
this tree is slower: where even the 20 % quantile of its time over the other's exceeds --tolerance.

--self-check times this tree against itself, in two processes too, and shows what a ratio of this command is worth: the
same version twice has to agree within the printed spread. Exit code 1 where 1 lies outside.
"""

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from meanflow.errors import UserError

from .harness.arbiter import alone
from .harness.arguments import BadInput, finite
from .harness.clock import quantiles
from .harness.environment import clocks
from .harness.rows import append
from .harness.turns import turns
from .pages.ratios import ITSELF, agrees
from .workloads.step_timer import timed
from .workloads.step_variants import VARIANTS
from .workloads.step_workload import add_workload_arguments, identity, make_workload, title

ROOT = Path(__file__).parents[1]
READY = "ready"
TURNS = {"cuda": 40, "cpu": 15}


def serve(options: argparse.Namespace) -> None:
    """Take a step for each number on standard input, and answer with its milliseconds."""
    work = make_workload(options)
    variant = VARIANTS[options.variant](work)
    timed(variant, work.inputs(0), work.device)
    print(READY, flush=True)
    for line in sys.stdin:
        print(timed(variant, work.inputs(int(line)), work.device), flush=True)


class Side:
    """A process that takes steps with the code of one revision."""

    def __init__(self, tree: Path, arguments: list[str]):
        # before what is there already
        path = [str(tree), str(tree / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        command = [sys.executable, "-m", "benchmarks.regression", "--serve", *arguments]
        self.tree = tree
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"benchmarks.regression: error: the step failed in {self.tree}; its message is above")
        return line

    def step(self, number: int) -> float:
        """Milliseconds of a step."""
        print(number, file=self.process.stdin, flush=True)
        return float(self.answer())


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The tree of a revision, with the native libraries of this one where their source is the same."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(tree), revision)
        if added.returncode:
            reason = added.stderr.strip().splitlines()[-1]
            raise BadInput(f"--base: got {revision!r}, wanted a revision of this repository ({reason}); see git log")
        try:
            if not (tree / "benchmarks" / "regression.py").exists():
                raise BadInput(f"--base: got {revision!r}, which cannot be timed yet, wanted one with this command")
            if _git("diff", "--quiet", revision, "--", "csrc").returncode == 0:
                for library in (ROOT / "kernels" / "meanflow_kernels").glob("native_*.so"):
                    shutil.copy(library, tree / "kernels" / "meanflow_kernels")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def compare(here: Side, there: Side, repeats: int, seconds: float = math.inf, device: str = "cpu") -> dict:
    """Times of both, and the quantiles of here over there by the pairs of a turn."""
    for side in (here, there):
        assert side.answer() == READY
    samples = {here: [], there: []}
    with alone(device):
        for turn in turns(repeats, seconds):
            for side in (here, there) if turn % 2 else (there, here):
                samples[side].append(side.step(turn))
        found = clocks(device)
    ratios = quantiles([a / b for a, b in zip(samples[here], samples[there], strict=True)])
    return {
        "kind": "regression",
        "ms": quantiles(samples[here])[1],
        "base_ms": quantiles(samples[there])[1],
        "ratio": dict(zip(("20", "50", "80"), ratios, strict=True)),
        "turns": len(samples[here]),
    } | found


def verdict(row: dict, tolerance: float) -> tuple[str, bool]:
    """The ratio in words, and True if it is a failure."""
    ratio = row["ratio"]
    if row["base"] == ITSELF:
        return ("agrees: 1 lies within", False) if agrees(ratio) else ("DISAGREES: 1 lies outside", True)
    slower = ratio["20"] > 1 + tolerance
    return ("SLOWER" if slower else "not slower", slower)


def sides_of(base: str) -> contextlib.AbstractContextManager[Path]:
    tree = ROOT if base == ITSELF else Path(base).resolve()
    given = (tree / "benchmarks" / "regression.py").exists()
    return contextlib.nullcontext(tree) if given else checkout(base)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.regression", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", default="HEAD", help="the revision or the folder to compare with (default HEAD)")
    which.add_argument("--self-check", dest="base", action="store_const", const=ITSELF, help="this tree against itself")
    parser.add_argument("--variant", default="ours", choices=VARIANTS, help="of the step (default ours)")
    parser.add_argument("--tolerance", type=finite, default=0.03, help="how much slower is slower (default 0.03)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    add_workload_arguments(parser)
    args = list(sys.argv[1:] if args is None else args)
    options = parser.parse_args(args)
    if options.turns is not None:
        # the turn is this process's, for both sides
        at = args.index("--turns")
        del args[at : at + 2]
    if options.serve:
        serve(options)
        return 0
    try:
        work = make_workload(options)
    except UserError as error:
        raise BadInput(f"benchmarks.regression: error: {error}") from None
    with sides_of(options.base) as tree:
        sides = []
        try:
            sides += [Side(ROOT, args), Side(tree, args)]
            row = compare(*sides, options.repeats or TURNS[options.device], options.seconds, options.device)
        finally:
            for side in sides:
                side.process.kill()
                side.process.wait()
    (row,) = append(
        [identity(work, options.preset) | {"variant": options.variant, "base": options.base} | row], options
    )
    ratio, (words, failed) = row["ratio"], verdict(row, options.tolerance)
    other = "the same a second time" if options.base == ITSELF else options.base
    print(f"{options.variant}, {title(row)}: this tree {row['ms']:.1f} ms, {other} {row['base_ms']:.1f} ms; ratio "
          f"{ratio['50']:.3f} ({ratio['20']:.3f} to {ratio['80']:.3f}, {row['turns']} pairs): {words}")  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
