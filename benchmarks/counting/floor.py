"""A lower bound of a step's time on a GPU by kind of work, from its FLOPs and fewest bytes, beside a measured step."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meanflow.config import RunConfig
from meanflow.errors import require
from meanflow.training.peaks import PEAKS

from ..harness.rows import objective_columns
from .accounts import MetaStep
from .step_kernels import POINTWISE, count_calls

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Rate:
    """The highest rate of a GPU at one thing, and its source."""

    value: float
    source: Literal["given", "measured", "datasheet"]


def find_rates(
    gpu: str, *, gemm_tflops: float | None = None, copy_gbps: float | None = None, results: Path = RESULTS
) -> tuple[Rate, Rate]:
    """A GPU's rates of 16-bit products in TFLOP/s and of copies in GB/s: given, or measured, or the datasheet's.

    Args:
        results: folders of committed rows; the fastest ceiling that was measured on this GPU counts.

    Raises:
        UserError: for a GPU of which nothing is known.
    """
    for name, given in (("gemm-tflops", gemm_tflops), ("copy-gbps", copy_gbps)):
        require(given is None or given > 0, name, given, "a positive number", "leave it out for a known GPU's")
    rows = list(_rows(gpu, results))
    peak = PEAKS.get(gpu)
    rates = []
    of_bounds = (("gemm", gemm_tflops, peak and peak.tflops), ("copy", copy_gbps, peak and peak.gbps))
    for bound, given, datasheet in of_bounds:
        # rows of other programs are beside no ceiling
        ceilings = (row.get("ceiling") for row in rows if row.get("bound") == bound)
        measured = max((x for x in ceilings if x is not None), default=None)
        known = {"given": given, "measured": measured, "datasheet": datasheet}
        found = next((Rate(value, source) for source, value in known.items() if value is not None), None)
        require(
            found is not None, "gpu", gpu, "one of " + ", ".join(PEAKS),
            "or give --gemm-tflops and --copy-gbps of yours",
        )  # fmt: skip
        rates.append(found)
    return tuple(rates)


def _rows(gpu: str, results: Path) -> Iterator[dict]:
    for path in sorted(results.glob("*/*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if row.get("gpu") == gpu:
                yield row


def least_bytes(config: RunConfig, accounts: dict) -> dict[str, float]:
    """The fewest bytes that a step of one process moves beside its products, by kind of work: the mean of the accounts.

    Each tensor of an operator counts once, read or written; the gradient is read once for its norm and once by the
    optimizer, which moves weights, moments, average and low-precision copies.
    """
    step = MetaStep(config)
    plans = [step.objective.example(each["sizes"]) for each in accounts["sizes"] for _ in range(each["batches"])]
    counted = count_calls(config, plans)
    calls = [op + call for op in (*POINTWISE, "silu") for call in ("", "_jvp", "_bwd") if op + call in counted]
    copied = zip(step.net.parameters(), step.net.make_copies(), strict=True)
    return {
        "pointwise operators": sum(counted[name].bytes for name in calls),
        "gradient's norm": sum(p.nbytes if copy is None else copy.nbytes for p, copy in copied),
        "optimizer": counted["adamw_ema"].bytes,
    }


def floor(flops: dict[str, float], moved: dict[str, float], gpu: str, gemm: Rate, copy: Rate) -> dict:
    """The time in ms that products of these FLOPs and moves of these bytes take at these rates, one after the other."""
    kinds = {name: {"flops": value, "ms": value / gemm.value / 1e9} for name, value in flops.items()}
    kinds |= {name: {"bytes": value, "ms": value / copy.value / 1e6} for name, value in moved.items()}
    return {
        "floor_ms": sum(kind["ms"] for kind in kinds.values()),
        "floor": {
            "gpu": gpu,
            "kinds": kinds,
            "gemm_tflops": gemm.value,
            "gemm_source": gemm.source,
            "copy_gbps": copy.value,
            "copy_source": copy.source,
        },
    }


def measured_step(config: RunConfig, gpu: str, *, results: Path = RESULTS) -> dict | None:
    """The fastest variant of ours in the newest rows of this step on this GPU: its variant, ms, commit and date."""
    wanted = {
        "model": config.model.name,
        "tokens": config.model.tokens,
        "batch": config.train.batch,
        "precision": config.train.precision,
        **objective_columns(config.objective),
    }
    found = [
        row
        for row in _rows(gpu, results)
        if row.get("variant") in ("ours", "ours-captured") and row.get("ms") and "images_per_second" in row
        and all(row.get(name) == value for name, value in wanted.items())
    ]  # fmt: skip
    newest = max((row["date"] for row in found), default=None)
    commit = next((row["commit"] for row in found if row["date"] == newest), None)
    best = min((row for row in found if row["commit"] == commit), key=lambda row: row["ms"], default=None)
    return best and {name: best[name] for name in ("variant", "ms", "commit", "date")}
