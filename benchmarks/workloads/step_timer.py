"""Timing variants of the step against each other: gradients first, then steps in pairs, a row as soon as it is known.

On a CPU the variants take turns, a step each, so that what else the machine does falls on all; a pair is a turn. On a
GPU each is built, timed and freed alone, so that its peak memory is its own; a pair is two steps of the same inputs
(draws and plan), which is what a step's time there depends on. Either way a variant that fails becomes a row with its
reason, and the others go on.
"""

import functools
import gc
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from meanflow.config import RunConfig
from meanflow.training.peaks import PEAKS
from meanflow_kernels.adamw_ema.native import MISSING

from ..counting.accounts import account
from ..harness.arbiter import alone, running_seconds
from ..harness.arguments import BadInput
from ..harness.clock import quantiles, stamp
from ..harness.environment import clocks, energy, merge
from ..harness.turns import Reason, attempt, turns
from .step_variants import VARIANTS, Variant, same_as
from .step_workload import Workload

GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""||g - g_first|| / ||g_first||: the rounding of two orders of summation, far below any mistake's."""


class Reference(NamedTuple):
    """The gradient that all others are compared with."""

    variant: str
    gradient: torch.Tensor


class Started(NamedTuple):
    """A variant after its first step; its gradient agreed with the reference."""

    variant: Variant
    columns: dict
    """Columns of its row on the first step."""
    reference: Reference


def measure(
    work: Workload, names: list[str], repeats: int, seconds: float = math.inf, against: str | None = None
) -> Iterator[dict]:
    """Yield one row per variant as soon as it is known.

    On a CPU, where variants alternate, those that cannot be timed come first.

    Args:
        repeats: most steps of each. seconds: on a CPU no turn is begun after this time, but three are
            taken. against: the variant whose gradient they are compared with, None for the first of them.

    Raises:
        SystemExit: where a gradient is another than the first's, or that of ``against`` is not to be had.
    """
    reference = reference_of(work, against) if against else None
    if work.device == "cuda":
        # as many steps of each, or they would be no pairs
        return in_turn(work, names, repeats, reference)
    return interleaved(work, names, repeats, seconds, reference)


def reference_of(work: Workload, name: str) -> Reference:
    """The gradient of a variant that is not timed.

    Raises:
        SystemExit: where it has none.
    """
    found, why = attempt(lambda: start(work, name, None).reference)
    clear()
    if why:
        raise BadInput(f"--against: got {name}, which cannot be a reference here ({why.words}); name another")
    return found


def clear() -> None:
    """Forget what the last variant compiled, and free its memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def interleaved(
    work: Workload, names: list[str], repeats: int, seconds: float, reference: Reference | None = None
) -> Iterator[dict]:
    """All variants side by side, a step each in turn; ratios are of the pairs of a turn."""
    started, samples = {}, {}
    for name in names:
        found, why = attempt(lambda name=name, reference=reference: start(work, name, reference))
        if why:
            yield untimed(name, why)
        else:
            started[name], samples[name], reference = found, [], found.reference
    lost = {}
    with alone(work.device):
        for step in tqdm(turns(repeats, seconds), total=repeats, desc="timing", unit="turn"):
            inputs = work.inputs(step)
            # every other turn backwards, so that nobody always follows the same neighbour
            for name in list(started) if step % 2 else reversed(list(started)):
                ms, why = attempt(lambda name=name, inputs=inputs: timed(started[name].variant, inputs, work.device))
                if why:
                    # another plan's size: the rest keep their pairs
                    del started[name], samples[name]
                    lost[name] = why
                else:
                    samples[name].append(ms)
    for name, why in lost.items():
        yield untimed(name, why)
    for name, found in started.items():
        yield merge(row(name, samples[name], work), found.columns, against(samples, name))


def in_turn(work: Workload, names: list[str], repeats: int, reference: Reference | None = None) -> Iterator[dict]:
    """Each variant alone on the GPU; ratios are of pairs of the same inputs."""
    samples = {}
    batches = [work.inputs(step) for step in range(repeats)]
    for name in tqdm(names, desc="timing", unit="variant"):
        found, why = attempt(lambda name=name, reference=reference: apart(work, name, reference, batches))
        clear()
        if why:
            yield untimed(name, why)
        else:
            samples[name], columns, reference = found
            yield merge(row(name, samples[name], work), columns, against(samples, name))


def apart(work: Workload, name: str, reference: Reference | None, batches: list) -> tuple[list[float], dict, Reference]:
    """Time one variant alone: milliseconds of each step, columns of its row, and the reference for the next."""
    # from the start: what a captured step holds was allocated while it was captured
    torch.cuda.reset_peak_memory_stats()
    variant, columns, reference = start(work, name, reference)
    with alone(work.device):
        timed(variant, batches[0], work.device)
        before = energy()
        samples = [timed(variant, inputs, work.device) for inputs in batches]
        used = merge(joules(before, energy(), len(batches) * work.run.train.batch), clocks(work.device))
    memory = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return samples, merge(columns, memory, used), reference


def untimed(name: str, why: Reason) -> dict:
    """Print and return the row of a variant without a time, with its reason."""
    print(f"{name}: not timed: {why.words}", flush=True)
    return {"kind": "step", "variant": name, "ms": None, "failed": why.failed, "missing": {"ms": why.words}}


def start(work: Workload, name: str, reference: Reference | None) -> Started | Reason:
    """Build a variant and take its first step, whose gradient must be the reference's.

    Raises:
        SystemExit: where it is another.
    """
    if same := same_as(name, work):
        return Reason(same, failed=False)
    variant, inputs = VARIANTS[name](work), work.inputs(0)
    begin = running_seconds()
    variant.prepare(inputs)
    variant.first_step()
    stamp(work.device)
    columns = {"first_step_seconds": running_seconds() - begin, "gradient_against": None}
    gradient = variant.gradient()
    if reference is None:
        reference = Reference(name, gradient)
        words = "the others' gradients are compared with its"
    else:
        difference = ((gradient - reference.gradient).norm() / reference.gradient.norm()).item()
        if not difference <= GRADIENT_TOLERANCE[work.run.train.precision]:
            raise SystemExit(f"{name}: its gradient is {difference:.2e} off {reference.variant}'s, it was not timed")
        columns |= {"gradient_against": reference.variant, "gradient_difference": difference}
        words = f"gradient {difference:.1e} off {reference.variant}'s"
    print(f"{name}: first step after {columns['first_step_seconds']:.1f} s, {words}", flush=True)
    return Started(variant, columns, reference)


def timed(variant: Variant, inputs, device: str) -> float:
    """Milliseconds of one step, from asking for it to its end."""
    variant.prepare(inputs)
    begin = stamp(device)
    variant.step()
    return stamp(device) - begin


def joules(before: dict, after: dict, images: int) -> dict:
    """The GPU's energy for an image, waiting between steps included, or why it is not known."""
    if "joules" in before and "joules" in after:
        return {"joules_per_image": (after["joules"] - before["joules"]) / images}
    return {"missing": {"joules_per_image": (before | after)["missing"]["joules"]}}


def against(samples: dict[str, list[float]], name: str) -> dict:
    """Speed-up of a variant over the first and over the compiled naive step: quantiles over the pairs."""
    bases = {base for base in (next(iter(samples)), "naive-compiled") if base in samples and base != name}
    pairs = {base: [a / b for a, b in zip(samples[base], samples[name], strict=True)] for base in bases}
    return {
        "times": {base: dict(zip(("20", "50", "80"), quantiles(found), strict=True)) for base, found in pairs.items()}
    }


def row(name: str, samples: list[float], work: Workload) -> dict:
    low, ms, high = quantiles(samples)
    needed = needed_flops(work.run)
    peak = PEAKS.get(torch.cuda.get_device_name()) if work.device == "cuda" else None
    plain = {"native optimizer": MISSING[work.device]} if work.device in MISSING else {}
    return {
        "kind": "step",
        "variant": name,
        "ms": ms,
        "ms_20": low,
        "ms_80": high,
        "samples": len(samples),
        "step_ms": [round(x, 4) for x in samples],
        "images_per_second": 1e3 * work.run.train.batch / ms,
        "needed_flops": needed,
        "tflops": needed / ms / 1e9,
        "mfu": needed / ms / 1e9 / peak.tflops if peak and work.run.train.precision == "bf16" else None,
    } | ({"missing": plain} if plain else {})


@functools.cache
def needed_flops(run: RunConfig) -> float:
    """FLOPs that the recipe needs, whoever computes it: the planned step without padding, mean of 100 drawn batches."""
    accounts = account(run, batches=100)
    return accounts["step_in_forwards_unpadded"] * accounts["forward_flops"]
