"""Hardware, versions, commit and date: the columns that every row has."""

import datetime
import platform
from pathlib import Path

import torch

from meanflow.storage.record import commit as source_commit
from meanflow.training.peaks import PEAKS


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's own name; its architecture where the system does not tell."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _nvml(read) -> tuple[dict, dict]:
    """Call ``read`` with NVML and its handle of the current GPU: the result, or the reason why there is none."""
    try:
        import pynvml
    except ImportError as error:
        return {}, {"nvml": f"{error}: install nvidia-ml-py"}
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        return read(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)), {}
    except pynvml.NVMLError as error:
        return {}, {"nvml": str(error)}


def merge(*columns: dict) -> dict:
    """One row of several groups of columns; reasons for missing columns are merged too."""
    row = {key: value for some in columns for key, value in some.items() if key != "missing"}
    missing = {key: why for some in columns for key, why in some.get("missing", {}).items()}
    return row | ({"missing": missing} if missing else {})


def known_gpu() -> str:
    """The GPU of this machine where its datasheet is known, else an H200."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return name if name in PEAKS else "NVIDIA H200"


def clocks(device: str) -> dict:
    """A GPU's SM and memory clocks in MHz and NVML's throttle bits at this moment, or why they cannot be read."""

    def read(pynvml, gpu) -> dict:
        columns = {
            "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
            "throttle_bits": lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu),
        }
        found, missing = {}, {}
        for name, column in columns.items():
            try:
                found[name] = column()
            except pynvml.NVMLError as error:
                missing[name] = str(error)
        return merge(found, {"missing": missing})

    if device != "cuda":
        return {}
    found, missing = _nvml(read)
    return merge(found, {"missing": missing})


def energy() -> dict:
    """Energy of the current GPU since its driver was loaded, in joules, or the reason why it cannot be read."""

    def read(pynvml, gpu) -> dict:
        return {"joules": pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3}

    if not torch.cuda.is_available():
        return {"missing": {"joules": "no NVIDIA GPU"}}
    found, missing = _nvml(read)
    return found | ({"missing": {"joules": missing["nvml"]}} if missing else {})


def environment(device: str, commit: str | None = None) -> dict:
    """Hardware, driver, versions, commit and date. ``commit`` is for a tree that is no git checkout."""
    row = {
        "device": device,
        "gpu": None,
        "driver": None,
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": commit or source_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device == "cpu":
        return row | {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    found, missing = _nvml(lambda pynvml, gpu: {"driver": pynvml.nvmlSystemGetDriverVersion()})
    return row | {"gpu": torch.cuda.get_device_name()} | found | ({"missing": missing} if missing else {})
