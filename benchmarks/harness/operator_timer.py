"""A row of one operator: its results compared with fp64 first, then host time and device time, then its rate."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meanflow.training.peaks import PEAKS
from meanflow_kernels.counts import Work

from . import clock
from .arbiter import alone
from .environment import clocks, merge
from .errors import relative_error
from .table import table


@dataclass
class OperatorTimer:
    """Collects the rows of a run on one device."""

    device: str
    environment: dict
    ceilings: clock.Ceilings
    path: Path | None = None
    """File of JSON lines that each row is appended to as soon as it is known."""
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self):
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cold = clock.ColdCache() if self.device == "cuda" else None

    def time(self, benchmark, fn: Callable[[], object], *, name: dict, work: Work, errors: dict[str, float]) -> None:
        """Time ``fn`` and keep the row.

        ``benchmark`` is pytest-benchmark's fixture: it times the host, which is the whole call on a CPU and its
        enqueueing on a GPU. ``name`` says what is timed, ``errors`` how far its results were from fp64.
        """
        settle = torch.cuda.synchronize if self.device == "cuda" else None
        # what compiles has compiled: it was called to be checked
        with alone(self.device):
            benchmark.pedantic(fn, setup=settle, rounds=20, iterations=1, warmup_rounds=3)
            if benchmark.disabled:
                return
            host = [1e3 * seconds for seconds in benchmark.stats.stats.data]
            host_ms = clock.quantiles(host)[1]
            device = clock.device_ms(fn, self._cold, host_ms) if self.device == "cuda" else host
            found = clocks(self.device)
        row = self._row(name, work, device) | {"host_ms": host_ms if self.device == "cuda" else None} | errors
        benchmark.extra_info.update({key: row[key] for key in ("ms", "tflops", "gbps")})
        self.rows.append(merge(row, found, self.environment))
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def _row(self, name: dict, work: Work, samples: list[float]) -> dict:
        low, ms, high = clock.quantiles(samples)
        row = name | {"ms": ms, "ms_20": low, "ms_80": high, "samples": len(samples)}
        row |= {"flush": clock.FLUSH if self.device == "cuda" else None}
        row |= {"flops": work.flops, "bytes": work.bytes}
        row |= {"tflops": work.flops / ms / 1e9, "gbps": work.bytes / ms / 1e6}
        bound = "gemm" if work.flops else "copy"
        rate = row["tflops" if work.flops else "gbps"]
        ceiling = self.ceilings.gemm_tflops if work.flops else self.ceilings.copy_gbps
        row |= {"bound": bound, "ceiling": ceiling, "share_of_ceiling": rate / ceiling}
        peak = PEAKS.get(self.environment["gpu"])
        if peak is not None:
            row |= {"share_of_peak": rate / (peak.tflops if work.flops else peak.gbps), "peak_source": peak.source}
        return row

    def summary(self) -> str:
        """The rows as a table, under what was measured of the device itself."""
        env, ceilings = self.environment, self.ceilings
        where = env["gpu"] or f"CPU ({env['cpu']}), tiny shapes: no measure of a GPU"
        head = f"{where}; torch {env['torch']}, triton {env['triton']}, commit {env['commit']}\n"
        head += f"measured: copy {ceilings.copy_gbps:.0f} GB/s, "
        head += f"{ceilings.gemm} product {ceilings.gemm_tflops:.4g} TFLOP/s"
        lines = [_cells(row) + [self._times_ours(row)] for row in self.rows]
        return "\n".join([head, table(_HEADER, lines), *self._tangent_costs()])

    def _like(self, row: dict, **columns) -> list[dict]:
        """The rows of the same operator, shape and dtype, with ``columns`` as given."""
        wanted = {key: row[key] for key in ("op", "shape", "dtype")} | columns
        return [other for other in self.rows if wanted.items() <= other.items()]

    def _times_ours(self, row: dict) -> str:
        """The row's time over that of our variant of the same call."""
        ours = [r for r in self._like(row, call=row["call"]) if r["variant"].startswith("ours")]
        return f"{row['ms'] / ours[0]['ms']:.2f}" if ours else "-"

    def _tangent_costs(self) -> list[str]:
        """Lines: the time of primal and tangent over that of the fastest primal alone that was measured."""
        lines = []
        for row in self.rows:
            primals = self._like(row, call="primal")
            if row["variant"] == "ours" and primals:
                best = min(primals, key=lambda r: r["ms"])
                what = f"{row['op']}, {row['shape']}, {row['dtype']}"
                cost = f"primal and tangent take {row['ms'] / best['ms']:.2f} times the fastest primal alone"
                lines.append(f"{what}: {cost} ({best['variant']})")
        return lines


_HEADER = "op shape dtype variant ms_20 ms_50 ms_80 host_ms rate of_ceiling of_peak error error_dot x_ours".split()


def _cells(row: dict) -> list[object]:
    rate = f"{row['tflops']:.3g} TFLOP/s" if row["bound"] == "gemm" else f"{row['gbps']:.4g} GB/s"
    cells = [row["op"], row["shape"], row["dtype"], row["variant"]]
    cells += [f"{row[key]:.4f}" for key in ("ms_20", "ms", "ms_80")]
    cells += ["-" if row["host_ms"] is None else f"{row['host_ms']:.3f}", rate, f"{row['share_of_ceiling']:.0%}"]
    cells += [f"{row['share_of_peak']:.0%}" if "share_of_peak" in row else "-"]
    return cells + [f"{row[key]:.1e}" if key in row else "-" for key in ("error", "error_dot")]


# relative Frobenius error of a result against fp64: three roundings of the store for ours, ten times that for the
# others, whose intermediate results may be rounded too; the tests hold the kernels to more, this keeps a wrong one off
# the clock
BOUNDS = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-5}


def check(results: dict[str, tuple], dtype: torch.dtype, *, strict: bool) -> dict[str, float]:
    """The error of each pair (result, exact) by name.

    Raises:
        AssertionError: one is out of bounds, and nothing may be timed.
    """
    bound = BOUNDS[dtype] * (1 if strict else 10)
    errors = {name: relative_error(x, exact) for name, (x, exact) in results.items()}
    for name, error in errors.items():
        assert error <= bound, f"{name}: relative error {error:.1e} against fp64, at most {bound:.1e} may be timed"
    return errors
