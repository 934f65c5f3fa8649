"""Where a step's time goes: by part, and by kind of work.

python -m benchmarks.breakdown --model XL/2 --batch 32
python -m benchmarks.breakdown --device cpu --model S/8 --batch 4 --precision fp32 --eager --trace step.json

By part: drawing, loss, backward and optimizer are timed one after the other; the loss is timed once more without
guidance, and without guidance and derivative, and the differences are the parts' cost. By kind: the kernels of some
steps under torch.profiler, told apart by their names; on a CPU its operators, and the Python between them, while a
compiled region cannot be told apart there. --trace writes those steps for https://ui.perfetto.dev, with the parts as
named ranges: draw, loss, backward and optimizer; eager, the loss's passes of the network too, which compiled are one.
"""

import argparse
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from meanflow.engine import build_net
from meanflow.errors import UserError
from meanflow.objective import MeanFlowLoss
from meanflow.optim import make_optimizer
from meanflow.plan import Planner
from meanflow.step import Inputs, compile_loss, declare_sizes, draw_batch

from .environment import clocks, merge
from .rows import why_untimed
from .step import add_workload_arguments, append, identity, make_workload, title
from .table import table
from .timing import quantiles, stamp
from .variants import Ours, Workload

PROFILED_STEPS = 3
OTHER = "pointwise"
KINDS = {  # a kernel's or operator's name tells its kind; the first that matches
    # in plain torch only attention has batched products and softmax; its scaling and row sums stay pointwise
    "attention": r"attention|flash|fmha|sdpa|aten::bmm|softmax|logsumexp",
    # Inductor's are named for all operators in them, casts ("_to_copy") and the products beside them too
    OTHER: r"^triton_(poi|red|per)_",
    "GEMM": r"gemm|gemv|cutlass|cublas|nvjet|xmma|triton_tem|aten::(add)?mm|mkl_linear|mkldnn|packed_linear",
    "optimizer": r"adam|lerp|multi_tensor|_foreach",
    "memory": r"memcpy|memset|copy",
    "compiled, not told apart": r"compiled",
}
PYTHON = "Python"
IDLE = "idle"
NO_KERNELS = "the profiler saw no kernel on the GPU: torch without CUPTI, or another profiler holds it"


class Parts:
    """The step cut into its phases, for an objective."""

    def __init__(self, work: Workload, *, compiled: bool):
        run = work.run
        net = build_net(run.model, work.compute_dtype)
        net.load_state_dict(work.weights())
        self.net, self.run, self.compiled = net.to(work.device), run, compiled
        self.loss = MeanFlowLoss(run.objective, self.net)
        if compiled:
            compile_loss(self.loss)
        ema = build_net(run.model).to(work.device).requires_grad_(False)
        self.optimizer = make_optimizer(run.optim, self.net, ema, copies=work.compute_dtype is not None)
        self.planner = Planner(run.objective, run.train.batch)

    def times(self, inputs: Inputs, device: str) -> dict[str, float]:
        """Milliseconds of each phase."""
        plan = self.planner.plan(inputs.r.cpu(), inputs.t.cpu(), inputs.drop.cpu()).to(inputs.r.device)
        if self.compiled:
            declare_sizes(plan)
        at = [stamp(device)]
        x, e = draw_batch(self.run, inputs.batch, inputs.samples, inputs.step)
        at.append(stamp(device))
        loss = self.loss(x, e, inputs.r, inputs.t, inputs.batch.labels, inputs.drop, plan).loss
        at.append(stamp(device))
        self.optimizer.zero_grad()
        loss.backward()
        at.append(stamp(device))
        self.optimizer.step()
        at.append(stamp(device))
        return dict(zip(("draw", "loss", "backward", "optimizer"), (b - a for a, b in zip(at, at[1:])), strict=True))


def by_part(work: Workload, repeats: int, *, compiled: bool) -> dict[str, float]:
    """Median milliseconds of each part."""
    objective = work.run.objective
    unguided = replace(objective, omega=1.0, kappa=0.0)
    objectives = {"whole": objective, "unguided": unguided, "primal": replace(unguided, share_equal=1.0)}
    found = {}
    for name, each in objectives.items():
        variant = replace(work, run=replace(work.run, objective=each))
        # a function is compiled so many times at most, whichever objective it is for
        torch.compiler.reset()
        parts, batches = Parts(variant, compiled=compiled), [variant.inputs(k) for k in range(repeats + 2)]
        samples = [parts.times(inputs, work.device) for inputs in batches][2:]
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


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def kinds_of(events, device: str) -> dict[str, float]:
    """Milliseconds of each kind in a profile's averaged events: of kernels on a GPU, of operators on a CPU."""
    ms = Counter()
    for event in events:
        if device == "cuda":
            # an operator's event repeats its kernels' time, a named range that of all within
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                ms[kind_of(event.key)] += event.self_device_time_total / 1e3
        else:
            # what a named range has of its own is between the operators
            kind = PYTHON if event.is_user_annotation else kind_of(event.key)
            ms[kind] += event.self_cpu_time_total / 1e3
    return dict(ms)


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


def by_kind(work: Workload, trace: Path | None, *, compiled: bool) -> dict[str, float]:
    """Milliseconds a step of each kind of kernel, none where the profiler saw none; on a GPU also those of waiting."""
    torch.compiler.reset()
    variant = Ours(work, compile=compiled)
    if not compiled:
        name_passes(variant.net)
    batches = [work.inputs(k) for k in range(PROFILED_STEPS + 3)]

    def steps(inputs: list[Inputs]) -> float:
        begin = stamp(work.device)
        for each in inputs:
            variant.prepare(each)
            variant.step()
        return stamp(work.device) - begin

    steps(batches[:2])
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (work.device == "cuda")
    # the profiler's own start takes longer than a step, and would be counted as waiting
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as profiler:
        steps(batches[2:3])
        profiler.step()
        wall = steps(batches[3:])
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    ms = kinds_of(profiler.key_averages(), work.device)
    if work.device == "cuda" and ms:
        ms[IDLE] = max(0.0, wall - sum(ms.values()))
    return {kind: total / PROFILED_STEPS for kind, total in ms.items()}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.breakdown", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_workload_arguments(parser)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--trace", type=Path, default=None, help="write a trace of some steps to this file")
    options = parser.parse_args(args)
    try:
        work = make_workload(options)
    except UserError as error:
        raise SystemExit(f"benchmarks.breakdown: error: {error}") from None
    repeats = options.repeats or (20 if work.device == "cuda" else 5)
    columns = identity(work, options.preset) | {
        "kind": "breakdown",
        "variant": "ours-eager" if options.eager else "ours",
    }
    measures = {
        "part": lambda: by_part(work, repeats, compiled=not options.eager),
        "kind": lambda: by_kind(work, options.trace, compiled=not options.eager),
    }
    rows = []
    for by, measure in measures.items():
        ms = measure()
        rows.append(
            merge(columns, {"by": by, "ms": ms}, {} if ms else {"missing": {"ms": NO_KERNELS}}, clocks(work.device))
        )
    if options.trace:
        rows[-1]["trace"] = options.trace.name
    rows = append(rows, options)
    print(title(rows[0]), "\n")
    for row in rows:
        if why := why_untimed(row):
            print(f"by {row['by']}: not told apart: {why}\n")
            continue
        total = sum(row["ms"].values())
        lines = [[name, f"{ms:.2f}", f"{ms / total:.0%}"] for name, ms in row["ms"].items()]
        print(table([f"by {row['by']}", "ms", "share"], [*lines, ["sum", f"{total:.2f}", ""]]), "\n")


if __name__ == "__main__":
    main()
