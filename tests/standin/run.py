"""Run a command on a GPU's stand-in: ``python tests/standin/run.py COMMAND ...`` or ``... run.py -m MODULE ...``.

python tests/standin/run.py -m benchmarks.step --model S/8 --batch 16 --compare ours-captured --repeats 3
python tests/standin/run.py -m pytest -m gpu tests/meanflow/training/test_captured.py
STANDIN_DEVICES=2 python tests/standin/run.py -m torch.distributed.run --nproc-per-node 2 scripts/train.py ...

For a machine without a GPU whose torch is a CUDA build (PyPI's is one on Linux), with nvcc. The host's side of GPU code
runs as it is: wrong devices and dtypes, kernels that do not compile for sm_90, a wait where there must be none and
calls that a CUDA graph forbids show up. No kernel runs, so all results are meaningless: comparisons fail, times are the
host's, and no row can be mistaken for a GPU's, because the device's name says what it is. cuDNN and cuSOLVER are not
there, NVML neither. When a process ends it says how many kernels it launched and how often it waited.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
BUILT = ROOT / "build" / "standin"
WANTED = re.compile(r"^(cuda|__cuda|cublas|nccl|cu[A-Z])(?!File)")
PRODUCT = re.compile(r"gemm|gemv|^cublasLtMatmul$", re.IGNORECASE)


def symbols(*arguments: str) -> set[str]:
    """Names that nm finds."""
    found = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in found.splitlines() if line}


def needed() -> set[str]:
    """The CUDA functions that torch and Triton call."""
    import triton

    libraries = sorted(Path(torch.__file__).parent.joinpath("lib").glob("lib*.so"))
    names = {name for library in libraries for name in symbols("-D", "--undefined-only", str(library))}
    driver = Path(triton.__file__).parent / "backends" / "nvidia" / "driver.c"
    return {name for name in names | set(re.findall(r"\bcu[A-Z]\w+", driver.read_text())) if WANTED.match(name)}


def build() -> None:
    """The library: what the two halves define, and a stub that returns 0 for every other function."""
    library, halves = BUILT / "libcuda.so.1", [HERE / "runtime.cpp", HERE / "driver.cpp"]
    sources = [*halves, HERE / "standin.h", HERE / "run.py", *(ROOT / "csrc").iterdir()]
    stamp = f"{torch.__version__} {max(p.stat().st_mtime for p in sources)}"
    if library.exists() and (BUILT / "stamp").read_text() == stamp:
        return
    BUILT.mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-std=c++17", "-Xcompiler=-fPIC", "--cudart=none", "-w"]
    objects = [str(BUILT / half.with_suffix(".o").name) for half in halves]
    for half, target in zip(halves, objects, strict=True):
        subprocess.run(["nvcc", *flags, "-x", "c++", "-c", str(half), "-o", target], check=True)
    defined = symbols("--defined-only", "--extern-only", *objects)
    stubs = [
        f"int {name}(void) {{ return {'standin_launch()' if PRODUCT.search(name) else '0'}; }}"
        for name in sorted(needed() - defined)
    ]
    (BUILT / "stubs.c").write_text("int standin_launch(void);\n" + "\n".join(stubs) + "\n")
    objects += [str(BUILT / "stubs.c"), "-lpthread"]
    subprocess.run(["nvcc", *flags, "-shared", *objects, "-o", f"{library}.new"], check=True)
    # the package's own library brings a CUDA runtime of its own, which would look for a real driver
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILT)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NVCC_APPEND_FLAGS": "--cudart=none"}, check=True)
    os.replace(f"{library}.new", library)
    (BUILT / "stamp").write_text(stamp)


def environment() -> dict[str, str]:
    """What a process needs to find the stand-in."""
    path = os.pathsep.join(map(str, (HERE / "site", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", ""))))
    return os.environ | {
        "LD_PRELOAD": str(BUILT / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(BUILT),
        "TRITON_LIBCUDA_PATH": str(BUILT),
        "PYTHONPATH": path.rstrip(os.pathsep),
    }


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if torch.version.cuda is None or torch.cuda.is_available():
        why = (
            "this machine has one"
            if torch.cuda.is_available()
            else f"torch {torch.__version__} is a build without CUDA"
        )
        print(f"standin: got a wish for a GPU's stand-in, but {why}; it needs a CUDA build and no GPU", file=sys.stderr)
        return 2
    build()
    os.execvpe(sys.executable, [sys.executable, *arguments], environment())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
