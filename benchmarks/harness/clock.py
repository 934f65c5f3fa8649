"""Milliseconds of one call, on the device with a cold cache or on the host; and the ceilings of the device.

``operator_timer`` makes a row of an operator from them, ``workloads.step_timer`` a row of a training step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SAMPLES = 50
"""Timed calls: enough for stable 20 % and 80 % quantiles."""
BUDGET_SECONDS = 1.0
"""Device time for one measurement, beyond which it takes fewer samples, but at least ten."""


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantiles."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(samples, dtype=torch.float64).quantile(levels).tolist())


FLUSH = "write, read"
"""ColdCache's way to evict, as a column of a row: rows of different ways must not be compared."""


class ColdCache:
    """Two buffers larger than the L2 cache, one written, then the other read: that evicts what the last call left there
    and keeps the GPU busy. Were it written alone, its own dirty lines would be left to the timed call to write back.
    """

    def __init__(self):
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._written = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device="cuda")
        self._read = torch.zeros(max(2 * cache, 128 << 20) // 4, dtype=torch.float32, device="cuda")
        self.ms = self._time_one()

    def _time_one(self) -> float:
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.flush()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[2]

    def flush(self, times: int = 1) -> None:
        for _ in range(times):
            self._written.zero_()
            self._read.sum()


def device_ms(fn: Callable[[], object], cold: ColdCache, host_ms: float, samples: int = SAMPLES) -> list[float]:
    """Milliseconds on the GPU of each of ``samples`` calls, the L2 cache cold before each.

    ``host_ms`` is what the host takes to enqueue one call. The flush before a call lasts longer than that, so the GPU
    reaches the call after the host has enqueued all of it, and no wait for the host is in the time.
    """
    torch.cuda.synchronize()
    found, begin = [], time.perf_counter()
    while len(found) < samples and (len(found) < 10 or time.perf_counter() - begin <= BUDGET_SECONDS):
        found.append(timed_ms(fn, cold, host_ms))
    return found


def timed_ms(fn: Callable[[], object], cold: ColdCache, host_ms: float, before: Callable | None = None) -> float:
    """One sample of :func:`device_ms`; ``before`` runs between the flush and the clock's start."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold.flush(math.ceil(1.5 * host_ms / cold.ms) + 1)
    if before:
        before()
    start.record()
    fn()
    end.record()
    # the host waits here, so that its lead over the GPU is the flush's and not a queue's that may run full
    end.synchronize()
    return start.elapsed_time(end)


def host_ms(fn: Callable[[], object], device: str, samples: int = 10) -> float:
    """Median milliseconds until a call returns; on a GPU until it is enqueued."""
    times = []
    for _ in range(samples):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    return quantiles(times)[1]


def stamp(device: str) -> float:
    """The clock in milliseconds, once the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def wall_ms(fn: Callable[[], object], samples: int = SAMPLES) -> list[float]:
    """Milliseconds of each of ``samples`` calls on the CPU."""
    times = []
    for _ in range(samples):
        begin = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


@dataclass(frozen=True)
class Ceilings:
    """The rates that this device reached in this run for a copy and for a matrix product; no operator is faster."""

    copy_gbps: float
    """A large device-to-device copy, bytes read plus bytes written."""
    gemm_tflops: float
    """A large square matrix product on random data."""
    gemm: str
    """Size and dtype of that product."""


def measure_ceilings(device: str) -> Ceilings:
    """Time a copy and a matrix product: 2 GiB and 8192^3 bf16 on a GPU, 32 MiB and 512^3 fp32 on a CPU."""
    size, n, dtype = (2 << 30, 8192, torch.bfloat16) if device == "cuda" else (32 << 20, 512, torch.float32)
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    copy, gemm = (lambda: target.copy_(source)), (lambda: a @ b)
    times = []
    for fn in (copy, gemm):
        for _ in range(3):
            fn()
        if device == "cuda":
            times.append(device_ms(fn, ColdCache(), host_ms(fn, device), samples=20))
        else:
            times.append(wall_ms(fn, samples=10))
    copy_ms, gemm_ms = (quantiles(t)[1] for t in times)
    return Ceilings(2 * size / copy_ms / 1e6, 2 * n**3 / gemm_ms / 1e9, f"{n}x{n}x{n} {dtype}".replace("torch.", ""))
