"""Break a step's time down: by phase, by kind of work, and by kernel.

python -m benchmarks.breakdown --model XL/2 --batch 32
python -m benchmarks.breakdown --model XL/2 --batch 32 --kernels kernels.jsonl --captured
python -m benchmarks.breakdown --device cpu --model S/8 --batch 4 --precision fp32 --eager --trace step.json

By phase: drawing, loss, backward and optimizer are timed one after the other; the loss is timed once more without
guidance, and without guidance and derivative, and the differences are the phases' cost; a predicted direction counts
with the derivative that it is for. By kind: the kernels of some steps under torch.profiler, told apart by their names;
on a CPU its operators, and the Python between them, while a compiled region cannot be told apart there. --trace writes
those steps for https://ui.perfetto.dev, with the phases as named ranges: draw, loss, backward and optimizer; eager, the
loss's passes of the network too, which compiled are one. --kernels writes every kernel of those steps
(`pages.kernel_table` says what its rows mean), and times no phases, which would be compiled anew.
"""

import argparse
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from meanflow.errors import UserError
from meanflow.method.contract import ObjectiveLoss, Plan
from meanflow.model.build import build_net
from meanflow.model.copies import product_copies, products_kept
from meanflow.objectives.build import make_objective
from meanflow.training.draw import draw_batch
from meanflow.training.engine import compile_loss
from meanflow.training.messages import StepInputs
from meanflow.training.optim import make_optimizer
from meanflow.training.step import declare_sizes

from .counting import step_kernels
from .counting.step_kernels import Activity, activities
from .harness.arbiter import alone
from .harness.arguments import BadInput
from .harness.clock import Ceilings, measure_ceilings, quantiles, stamp
from .harness.environment import clocks, merge
from .harness.rows import append, why_untimed
from .harness.table import table
from .pages import kernel_table
from .workloads.step_variants import Ours
from .workloads.step_workload import Workload, add_workload_arguments, identity, make_workload, title

PROFILED_STEPS = 3
IDLE = "idle"
NO_KERNELS = "the profiler saw no kernel on the GPU: torch without CUPTI, or another profiler holds it"


class Phases:
    """The step cut into its phases, for an objective."""

    def __init__(self, work: Workload, *, compiled: bool):
        run = work.run
        net = build_net(run.model, work.compute_dtype)
        net.load_state_dict(work.weights())
        self.net, self.run, self.compiled = net.to(work.device), run, compiled
        ema = build_net(run.model).to(work.device).requires_grad_(False)
        self.objective = make_objective(run)
        self.loss = ObjectiveLoss(self.objective, self.net, ema if self.objective.takes_average else None)
        if compiled:
            compile_loss(self.loss)
        low = work.compute_dtype is not None
        self.optimizer = make_optimizer(run.optim, self.net, ema, copies=low, products=True)
        self.products = product_copies(self.net)

    def times(self, inputs: StepInputs, device: str) -> dict[str, float]:
        """Milliseconds of each phase."""
        host = inputs.to(torch.device("cpu"))
        inputs = inputs._replace(plan=self.objective.plan(host.drawn)).to(inputs.samples.device)
        if self.compiled:
            declare_sizes(self.objective, inputs.plan)
        at = [stamp(device)]
        x, e = draw_batch(self.run, inputs.batch, inputs.samples, inputs.step)
        at.append(stamp(device))
        with products_kept(self.products):
            loss = self.loss(x, e, inputs.batch.labels, inputs.drawn, inputs.plan).loss
            at.append(stamp(device))
            self.optimizer.zero_grad()
            loss.backward()
        at.append(stamp(device))
        self.optimizer.step()
        at.append(stamp(device))
        return dict(zip(("draw", "loss", "backward", "optimizer"), (b - a for a, b in pairwise(at)), strict=True))


def by_phase(work: Workload, repeats: int, *, compiled: bool) -> dict[str, float]:
    """Median milliseconds of each phase."""
    objective = work.run.objective
    unguided = replace(objective, omega=1.0, kappa=0.0, guidance_input="none")
    objectives = {"whole": objective, "unguided": unguided, "primal": replace(unguided, share_equal=1.0)}
    found = {}
    for name, each in objectives.items():
        variant = replace(work, run=replace(work.run, objective=each))
        # a function is compiled so many times at most, whichever objective it is for
        torch.compiler.reset()
        phases, batches = Phases(variant, compiled=compiled), [variant.inputs(k) for k in range(repeats + 2)]
        for inputs in batches[:2]:
            phases.times(inputs, work.device)
        # compiled by now
        with alone(work.device):
            samples = [phases.times(inputs, work.device) for inputs in batches[2:]]
        found[name] = {phase: quantiles([s[phase] for s in samples])[1] for phase in samples[0]}
    whole = found["whole"]
    return {
        "draw": whole["draw"],
        "guidance": whole["loss"] - found["unguided"]["loss"],
        "primal": found["primal"]["loss"],
        "tangent": found["unguided"]["loss"] - found["primal"]["loss"],
        "backward": whole["backward"],
        "optimizer": whole["optimizer"],
    }


def name_passes(net: nn.Module) -> None:
    """Give each call of an eager network a range in the profile, named for what it is in the loss."""
    ranges = []

    def enter(module, args, kwargs):
        dual = "primal and tangent" if kwargs.get("tangents") is not None else "primal"
        ranges.append(record_function(dual if torch.is_grad_enabled() else "guidance"))
        ranges[-1].__enter__()

    def leave(*_):
        ranges.pop().__exit__(None, None, None)

    net.register_forward_pre_hook(enter, with_kwargs=True)
    net.register_forward_hook(leave, always_call=True)


class Profile(NamedTuple):
    """A profile of PROFILED_STEPS steps."""

    found: list[Activity]
    wall_ms: float
    plans: list[Plan]
    """The plans of the profiled steps."""
    ceilings: Ceilings | None
    """Measured in the same run; None unless asked for."""


def profile_steps(work: Workload, trace: Path | None, *, ceilings: bool = False, **train) -> Profile:
    """Profile some steps of ours; ``train`` are options of the step, such as compile and cuda_graph."""
    torch.compiler.reset()
    variant = Ours(work, **train)
    if not train["compile"]:
        name_passes(variant.net)
    batches = [work.inputs(k) for k in range(PROFILED_STEPS + 3)]

    def steps(inputs: list[StepInputs]) -> float:
        begin = stamp(work.device)
        for each in inputs:
            variant.prepare(each)
            variant.step()
        return stamp(work.device) - begin

    steps(batches[:2])
    watched = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (work.device == "cuda")
    profiler = profile(activities=watched, schedule=schedule(wait=0, warmup=1, active=1, repeat=1))
    # compiled and captured by now
    with alone(work.device):
        # the profiler's own start takes longer than a step, and would be counted as waiting
        with profiler:
            steps(batches[2:3])
            profiler.step()
            wall = steps(batches[3:])
        measured = measure_ceilings(work.device) if ceilings else None
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    found = activities(profiler.key_averages(), work.device)
    return Profile(found, wall, [each.plan for each in batches[3:]], measured)


def by_kind(profiled: Profile, device: str) -> dict[str, float]:
    """Milliseconds a step by kind of kernel, empty if the profiler saw none; on a GPU the idle time is a kind too."""
    ms = Counter()
    for each in profiled.found:
        ms[each.kind] += each.ms
    if device == "cuda" and ms:
        ms[IDLE] = max(0.0, profiled.wall_ms - sum(ms.values()))
    return {kind: total / PROFILED_STEPS for kind, total in ms.items()}


def kernels_of(profiled: Profile, work: Workload) -> list[dict]:
    """The rows of the kernel table."""
    counted = step_kernels.count_calls(work.run, profiled.plans)
    wall_ms = profiled.wall_ms / PROFILED_STEPS
    return step_kernels.kernel_rows(profiled.found, counted, profiled.ceilings, wall_ms, PROFILED_STEPS)


def print_cuts(rows: list[dict]) -> None:
    """The rows by phase and by kind as tables."""
    print(title(rows[0]), "\n")
    for row in rows:
        if why := why_untimed(row):
            print(f"by {row['by']}: not told apart: {why}\n")
            continue
        total = sum(row["ms"].values())
        lines = [[name, f"{ms:.2f}", f"{ms / total:.0%}"] for name, ms in row["ms"].items()]
        print(table([f"by {row['by']}", "ms", "share"], [*lines, ["sum", f"{total:.2f}", ""]]), "\n")


def arguments(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.breakdown", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_workload_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--eager", action="store_true", help="do not compile")
    how.add_argument("--captured", action="store_true", help="replay a CUDA graph; with --kernels, on a GPU")
    parser.add_argument("--trace", type=Path, default=None, help="write a trace of some steps to this file")
    parser.add_argument("--kernels", type=Path, default=None, metavar="FILE",
                        help="append every kernel of a step to this file of JSON lines; time no phases")  # fmt: skip
    options = parser.parse_args(args)
    if options.captured and (options.kernels is None or options.device == "cpu"):
        wanted = "--kernels and a GPU; a replayed graph has kernels, but no phases"
        parser.error(f"--captured: got --kernels {options.kernels}, --device {options.device}, wanted {wanted}")
    return options


def measure(options: argparse.Namespace) -> None:
    """Time the step, append the rows and print them.

    Raises:
        UserError: for a value out of range, and where memory or the compiler fails.
    """
    work = make_workload(options)
    variant = "ours-eager" if options.eager else "ours-captured" if options.captured else "ours"
    columns = identity(work, options.preset) | {"variant": variant}

    def cut(by: str, ms: dict[str, float]) -> dict:
        row = {"kind": "breakdown", "by": by, "ms": ms} | ({} if ms else {"missing": {"ms": NO_KERNELS}})
        return merge(columns, row, clocks(work.device))

    rows = []
    if options.kernels is None:
        repeats = options.repeats or (20 if work.device == "cuda" else 5)
        rows.append(cut("phase", by_phase(work, repeats, compiled=not options.eager)))
    train = {"compile": not options.eager, "cuda_graph": options.captured}
    profiled = profile_steps(work, options.trace, ceilings=options.kernels is not None, **train)
    rows.append(cut("kind", by_kind(profiled, work.device)))
    if options.trace:
        rows[-1]["trace"] = options.trace.name
    print_cuts(append(rows, options))
    if options.kernels and not profiled.found:
        print(f"no table of kernels: {NO_KERNELS}")
    elif options.kernels:
        found, speed = kernels_of(profiled, work), clocks(work.device)
        print(kernel_table.text(append([merge(columns, row, speed) for row in found], options, options.kernels)))


def main(args: list[str] | None = None) -> None:
    try:
        measure(arguments(args))
    except UserError as error:
        raise BadInput(f"benchmarks.breakdown: error: {error}") from None


if __name__ == "__main__":
    main()
