"""Installs the rooms: the packages `meanflow` (the method) and `meanflow_kernels` (the operators, in kernels/).

The native libraries of csrc/ go into meanflow_kernels when torch and a compiler are at hand during the build
(`pip install --no-build-isolation -e .`); the CUDA one also needs nvcc (CUDA_HOME or the PATH), but no GPU. Without
them the package is whole all the same: its operators then run on plain torch and say so.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# LibTorch's stable ABI of 2.11: one library serves that version and the later ones. No Python headers are needed.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DNDEBUG"]
# the sources spell out each fused multiply-add, so that all compilers round alike
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
CPU_FLAGS = [*CXX_FLAGS, "-fno-math-errno", "-fno-trapping-math"]
CUDA_FLAGS = [
    "-O3",
    "-std=c++17",
    "--fmad=false",
    "--threads=2",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]
GPUS = [f"-gencode=arch=compute_{a},code={kind}_{a}" for a, kind in ((80, "sm"), (90, "sm"), (90, "compute"))]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of the PATH."""
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


class BuildNative(build_ext):
    """Compiles each library by one command. A failure is a warning, for the extensions are declared optional."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # loaded by torch, not by Python: no tag in its name

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            from torch.utils.cpp_extension import include_paths, library_paths

            if any(source.endswith(".cu") for source in ext.sources):
                # libtorch is what names libtorch_cuda, where there is one: the linker must not drop it
                compiler, link = [find_nvcc(), *CUDA_FLAGS, *GPUS], ["-Xlinker=--no-as-needed", "-ltorch"]
            else:
                compiler, link = [*os.environ.get("CXX", "c++").split(), *CPU_FLAGS], []
            paths = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
            command = [*compiler, *DEFINES, *paths, "-shared", *ext.sources, "-o", str(output), *link, "-ltorch_cpu"]
            subprocess.run(command, check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            reason = "the compiler failed, see above" if isinstance(error, subprocess.CalledProcessError) else error
            raise CompileError(
                f"{ext.name} is not built ({reason}); its operators will run on plain torch. To build it: "
                "a C++ compiler, torch installed, `pip install --no-build-isolation`."
            ) from error


LIBRARIES = {"meanflow_kernels.native_cpu": ["csrc/ops.cpp", "csrc/adamw_ema_cpu.cpp"]}
if find_nvcc():
    LIBRARIES["meanflow_kernels.native_cuda"] = ["csrc/adamw_ema_cuda.cu"]

COMMANDS = (
    "ablate", "compare", "convert", "evaluate", "export", "page", "prepare_data", "quickstart", "sample", "sweep",
    "train",
)  # fmt: skip

setup(
    name="meanflow",
    version="0.1.0",
    description="MeanFlow training with fused forward-mode kernels",
    python_requires=">=3.11",
    # the folder kernels/ is not a package: Hugging Face's PyPI package `kernels` keeps that import name
    packages=[*find_packages(include=["meanflow", "meanflow.*"]), *find_packages("kernels")],
    package_dir={"meanflow": "meanflow", "meanflow_kernels": "kernels/meanflow_kernels"},
    package_data={"meanflow.apps": ["page.html"], "meanflow.interop": ["imagenet_classes.txt"]},
    entry_points={"console_scripts": [f"meanflow-{n.replace('_', '-')} = meanflow.apps.{n}:run" for n in COMMANDS]},
    ext_modules=[Extension(name, files, optional=True) for name, files in LIBRARIES.items()],
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "diffusers",
        "matplotlib",
        "msgpack",
        "numpy",
        "nvidia-ml-py>=12.535",
        "pillow",
        "pytest-benchmark",
        "safetensors",
        "scikit-learn",
        "tensorboard",
        "tqdm",
        "tyro",
    ],
    extras_require={
        "test": ["accelerate", "datasets", "hypothesis", "kernels", "pytest", "pytest-xdist"],
        # what scripts/check.sh runs: another version may find other faults
        "dev": ["pyrefly==1.4.1", "ruff==0.17.6"],
        "orbax": ["tensorstore"],
        "datasets": ["datasets"],
        "fdd": ["transformers"],
        "flash-attn": ["flash-attn"],
        "wandb": ["wandb"],
        "xformers": ["xformers"],
    },
)
