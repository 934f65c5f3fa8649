"""The operator timer: its numbers follow from its rows, and it times nothing that is wrong."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.bench_silu import VARIANTS, Case, measure
from benchmarks.harness import clock
from benchmarks.harness import environment as environment_module
from benchmarks.harness.clock import Ceilings, device_ms, measure_ceilings, quantiles
from benchmarks.harness.environment import _nvml, clocks, energy, environment
from benchmarks.harness.operator_timer import OperatorTimer, check
from benchmarks.workloads import step_timer
from benchmarks.workloads.shapes import MODELS, naming, size_for
from benchmarks.workloads.step_timer import joules
from meanflow.training.peaks import PEAKS
from meanflow_kernels import silu, silu_jvp
from meanflow_kernels.counts import Work


class Benchmark:
    """pytest-benchmark's fixture, with times that are known."""

    disabled = False
    stats = SimpleNamespace(stats=SimpleNamespace(data=[0.001 * i for i in range(1, 12)]))

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, fn, **_):
        fn()


def _timer(gpu=None, path=None) -> OperatorTimer:
    found = environment("cpu") | {"gpu": gpu}
    return OperatorTimer(
        "cpu", found, Ceilings(copy_gbps=2000.0, gemm_tflops=500.0, gemm="8192x8192x8192 bfloat16"), path
    )


def _silu_case(op_jvp) -> Case:
    x, x_dot = torch.randn(2, 4, 128, dtype=torch.bfloat16)
    return Case(silu, op_jvp, torch.nn.functional.silu, (x,), (x_dot,))


def _name(variant: str) -> dict:
    return naming("silu", "XL/2", size_for("cpu", MODELS["XL/2"]), torch.bfloat16, variant)


def test_row_follows_from_its_times():
    timer = _timer("NVIDIA H200")
    work = Work(flops=12 * 10**9, bytes=10**6)
    timer.time(Benchmark(), lambda: None, name={"op": "x"}, work=work, errors={"error": 0.0})
    (row,) = timer.rows
    assert row["ms"] == pytest.approx(6.0) and row["ms_20"] == pytest.approx(3.0) and row["ms_80"] == pytest.approx(9.0)
    assert row["tflops"] == pytest.approx(12e9 / 6e-3 / 1e12)
    assert row["gbps"] == pytest.approx(1e6 / 6e-3 / 1e9)
    assert row["share_of_ceiling"] == pytest.approx(2 / 500)
    assert row["share_of_peak"] == pytest.approx(2 / PEAKS["NVIDIA H200"].tflops)
    assert row["peak_source"]


def test_pointwise_work_is_held_against_the_copy():
    timer = _timer()
    timer.time(Benchmark(), lambda: None, name={"op": "x"}, work=Work(flops=0, bytes=6 * 10**9), errors={})
    assert timer.rows[0]["bound"] == "copy"
    assert timer.rows[0]["share_of_ceiling"] == pytest.approx(0.5)


@pytest.mark.parametrize("gpu", [None, "NVIDIA GeForce RTX 9090"])
def test_unknown_gpu_gets_no_share_of_a_peak(gpu):
    timer = _timer(gpu)
    timer.time(Benchmark(), lambda: None, name={"op": "x"}, work=Work(1, 1), errors={})
    assert "share_of_peak" not in timer.rows[0]


def test_a_gpus_row_says_how_its_cache_was_flushed():
    timer, work = _timer("NVIDIA H200"), Work(flops=0, bytes=10**6)
    # on a CPU nothing is
    assert timer._row({"op": "x"}, work, [1.0])["flush"] is None
    timer.device = "cuda"
    assert timer._row({"op": "x"}, work, [1.0])["flush"] == clock.FLUSH != "write"


def test_row_says_where_and_when(tmp_path):
    timer = _timer(path=tmp_path / "deep" / "rows.jsonl")
    measure(timer, Benchmark(), _silu_case(silu_jvp), _name("ours"), *VARIANTS["ours"])
    row = json.loads((tmp_path / "deep" / "rows.jsonl").read_text())
    assert row["device"] == "cpu" and row["gpu"] is None and row["cpu"]
    assert row["torch"] == torch.__version__ and row["triton"] and row["date"].endswith("+00:00") and "commit" in row
    assert row["op"] == "silu" and row["call"] == "dual" and row["batch"] == 2
    # x, x_dot, y and y_dot, once each
    assert row["bytes"] == 4 * 4 * 128 * 2
    assert "tiny" in timer.summary() and "no measure of a GPU" in timer.summary()


@pytest.mark.parametrize(
    ("variant", "broken"),
    [
        ("ours", lambda primals, tangents: (silu(*primals), 1.01 * tangents[0])),
        ("ours", lambda primals, tangents: (silu(*primals) + 0.1, silu_jvp(primals, tangents)[1])),
        ("ours", lambda primals, tangents: (silu(*primals), math.nan * tangents[0])),
    ],
    ids=["wrong tangent", "wrong primal", "NaN"],
)
def test_no_number_on_a_red_check(variant, broken):
    timer = _timer()
    with pytest.raises(AssertionError, match="may be timed"):
        measure(timer, Benchmark(), _silu_case(broken), _name(variant), *VARIANTS[variant])
    assert timer.rows == []


def test_wrong_tangent_of_the_last_quarter_is_found():
    def broken(primals, tangents, *, tangent_start):
        return silu(*primals), silu_jvp((primals[0][:1],), tangents)[1]

    with pytest.raises(AssertionError, match="may be timed"):
        variant = "ours, tangent of a quarter"
        measure(_timer(), Benchmark(), _silu_case(broken), _name(variant), *VARIANTS[variant])


def test_error_bound_is_tighter_for_ours():
    exact = torch.randn(100, dtype=torch.float64)
    near = {"error": ((exact * 1.01).bfloat16(), exact)}
    assert check(near, torch.bfloat16, strict=False)["error"] == pytest.approx(0.01, rel=0.2)
    with pytest.raises(AssertionError):
        check(near, torch.bfloat16, strict=True)
    with pytest.raises(AssertionError):
        check({"error": (torch.full((100,), math.nan), exact)}, torch.float32, strict=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_missing_driver_is_a_reason_and_no_error():
    found, missing = _nvml(lambda pynvml, gpu: {"driver": "1"})
    assert found == {} and missing["nvml"]


def test_missing_nvml_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found, missing = _nvml(lambda pynvml, gpu: {"driver": "1"})
    assert found == {} and "install nvidia-ml-py" in missing["nvml"]


def refuse(words: str):
    def call(*_):
        raise NvmlError(words)

    return call


class NvmlError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """An NVML with one GPU of no known name, on a machine that may have none."""
    stub = SimpleNamespace(
        NVMLError=NvmlError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlSystemGetDriverVersion=lambda: "580.1", nvmlDeviceGetClockInfo=lambda gpu, clock: clock,
        NVML_CLOCK_SM=1980, NVML_CLOCK_MEM=2619, nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 4,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: 5000,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", stub)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 9090")
    return stub


@pytest.mark.parametrize(
    ("text", "name"),
    [("processor: 0\nmodel name\t: A CPU @ 2 GHz\nmodel name\t: B\n", "A CPU @ 2 GHz"), ("Hardware: board\n", "arch"),
     (None, "arch")],
)  # fmt: skip
def test_the_processor_has_its_name(monkeypatch, tmp_path, text, name):
    monkeypatch.setattr(environment_module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment_module.platform, "processor", lambda: "arch")
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    assert environment("cpu", "abc")["cpu"] == name


def test_what_nvml_says_is_in_the_row(nvml):
    assert energy() == {"joules": 5.0}
    assert clocks("cuda") == {"sm_mhz": 1980, "memory_mhz": 2619, "throttle_bits": 4}
    assert clocks("cpu") == {}
    row = environment("cuda", "abc")
    assert row["gpu"] == "NVIDIA GeForce RTX 9090" and row["driver"] == "580.1" and "missing" not in row
    assert joules({"joules": 5.0}, {"joules": 29.0}, images=8) == {"joules_per_image": 3.0}


def test_no_permission_to_read_power_costs_that_column_alone(nvml):
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse("Insufficient Permissions")
    found = energy()
    assert found == {"missing": {"joules": "Insufficient Permissions"}}
    assert joules({"joules": 5.0}, found, images=8) == joules(found, {"joules": 5.0}, images=8)
    assert joules(found, found, images=8) == {"missing": {"joules_per_image": "Insufficient Permissions"}}
    assert clocks("cuda")["sm_mhz"] == 1980 and environment("cuda", "abc")["driver"] == "580.1"


def test_a_driver_without_a_column_costs_that_column_alone(nvml):
    nvml.nvmlDeviceGetCurrentClocksEventReasons = refuse("Function Not Found")
    wanted = {"sm_mhz": 1980, "memory_mhz": 2619, "missing": {"throttle_bits": "Function Not Found"}}
    assert clocks("cuda") == wanted


def test_an_nvml_that_does_not_start_costs_its_columns_alone(nvml):
    nvml.nvmlInit = refuse("Driver Not Loaded")
    assert energy() == {"missing": {"joules": "Driver Not Loaded"}}
    assert clocks("cuda") == {"missing": {"nvml": "Driver Not Loaded"}}
    row = environment("cuda", "abc")
    assert row["gpu"] == "NVIDIA GeForce RTX 9090" and row["missing"] == {"nvml": "Driver Not Loaded"}


@pytest.mark.parametrize(("gpu", "known"), [("NVIDIA H200", True), ("NVIDIA GeForce RTX 9090", False)])
def test_only_a_known_gpus_step_has_mfu(nvml, monkeypatch, gpu, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    monkeypatch.setattr(step_timer, "needed_flops", lambda run: 4e12)
    train = SimpleNamespace(batch=8, precision="bf16")
    row = step_timer.row("ours", [9.0, 10.0, 11.0], SimpleNamespace(device="cuda", run=SimpleNamespace(train=train)))
    assert row["images_per_second"] == pytest.approx(800.0) and row["tflops"] == pytest.approx(400.0)
    assert row["mfu"] == (pytest.approx(400.0 / PEAKS[gpu].tflops) if known else None)


def test_quantiles_and_ceilings():
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    ceilings = measure_ceilings("cpu")
    assert ceilings.copy_gbps > 0 and ceilings.gemm_tflops > 0 and ceilings.gemm == "512x512x512 float32"


def test_gpu_is_busy_until_the_host_has_enqueued_the_call(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("wait")

        def elapsed_time(self, end):
            return 0.5

    cold = SimpleNamespace(ms=0.1, flush=lambda times: events.append(f"flush {times}"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert device_ms(lambda: events.append("call"), cold, host_ms=1.0, samples=3) == [0.5, 0.5, 0.5]
    # 16 flushes of 0.1 ms are longer than the host's 1 ms
    assert events == ["flush 16", "record", "call", "record", "wait"] * 3
