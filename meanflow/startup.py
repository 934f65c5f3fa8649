"""The first steps of a command, before torch is imported: find its environment, choose how threads wait, where compiled
code is kept and which GPU is seen.

Uses the standard library alone and the syntax of older Pythons, for it tells their users which Python to take.
"""

import hashlib
import importlib.util
import os
import platform
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAT = "/proc/stat"
CPUINFO = "/proc/cpuinfo"
DEVICES = "/dev"


def others():
    """How many others run, or wait for a core, just now: the median of ten looks within 50 ms, this program left out.

    Where no kernel says so in STAT (procs_running; proc(5)) it is the last minute's load average.
    """
    looks = []
    try:
        for _ in range(10):
            time.sleep(0.005)
            with open(STAT) as file:
                looks += [int(line.split()[1]) - 1 for line in file if line.startswith("procs_running ")]
    except OSError:
        pass
    return sorted(looks)[len(looks) // 2] if looks else os.getloadavg()[0]


def crowded():
    """Whether others are at work on the cores: threads that spin while they wait then starve those that compute.

    Digits on two cores (AMD EPYC), medians of five pairs: beside four busy processes 177 images/s passively, 42
    spinning; alone 916 as chosen here, 933 by default.
    """
    return others() > 0.75 * (os.cpu_count() or 1)


def choose_waiting():
    """Let OpenMP's threads wait passively on busy cores, unless OMP_WAIT_POLICY is set. Call before importing torch."""
    if "OMP_WAIT_POLICY" not in os.environ and crowded():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def cache_folder():
    """The user's cache folder for this program, made or not."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "meanflow")


def keep_compiled():
    """Keep what torch.compile compiles in the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR says where.

    torch's own place is the folder of temporary files, which a reboot empties. Kinds of processors have a folder each,
    for code is made for its processor and machines may share a home. Call before importing torch.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = os.path.join(cache_folder(), "compiled-" + processor())
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # no home, or none to write to
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def see_own_gpu():
    """Show each of several processes on a machine its own GPU alone, as torchrun --virtual-local-rank does.

    A GPU's number, which torch finds compiled code again by, is then 0 everywhere. LOCAL_RANK counts in
    CUDA_VISIBLE_DEVICES (numbers, or names of GPUs and of their MIG slices) or else in the machine's GPUs. Where those
    are too few all stays as it is, and so it does once torch is imported, when CUDA may have counted them.
    """
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if size == 1 or "torch" in sys.modules:
        return
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA reads as far as the first that is none
        gpus = gpus[: next((i for i, name in enumerate(gpus) if not name or name.startswith("-")), len(gpus))]
    else:
        files = [name for name in os.listdir(DEVICES) if re.match(r"nvidia\d", name)]
        gpus = [str(i) for i in range(len(files))]
    if size <= len(gpus):
        os.environ.update(CUDA_VISIBLE_DEVICES=gpus[int(os.environ["LOCAL_RANK"])], LOCAL_RANK="0")


def processor():
    """A name of what this processor can do."""
    told = platform.machine()
    try:
        with open(CPUINFO) as file:
            told += next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def enter(command, needed):
    """Restart in .venv if this Python is in no chosen environment or lacks a package; else say what is missing.

    Args:
        command: its name, for the message. needed: packages to import.
    """
    found, here = ROOT / ".venv", Path(sys.prefix).resolve()
    chosen = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    lacks = [name for name in needed if importlib.util.find_spec(name) is None]
    if sys.version_info < (3, 11):
        lacks.insert(0, "Python 3.11")
    python = found / "bin" / "python"
    if python.exists() and here != found.resolve() and (lacks or not chosen):
        arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]
        os.execv(str(python), [str(python), *arguments])
    if lacks:
        sys.stderr.write(
            f"{command}: error: python: got {sys.executable}, which lacks {', '.join(lacks)}, wanted an environment "
            "with what setup.py names; bash scripts/setup.sh makes one, and the same command then finds it\n"
        )
        sys.exit(2)
