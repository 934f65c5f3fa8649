"""The build: with a compiler, without one, without torch, with nvcc but no GPU; and the source distribution."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++")
NVCC = Path(os.environ["CUDA_HOME"], "bin", "nvcc") if "CUDA_HOME" in os.environ else shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler named c++")
needs_nvcc = pytest.mark.skipif(
    NVCC is None or COMPILER is None, reason="needs nvcc (CUDA_HOME or the PATH) and a C++ compiler"
)


@pytest.fixture
def tree(tmp_path):
    """The sources by themselves, with no library built."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "kernels", "meanflow"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run(tree: Path, *command: str, **env: str) -> str:
    """Run Python in the tree; returns all that it says."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CXX", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, *command], cwd=tree, env=inherited | env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def build(tree: Path, *, nvcc: bool = False, **env: str) -> tuple[str, set[str]]:
    """Build in place; returns what was said and the names of the libraries."""
    bare = tree / "bare_path"
    bare.mkdir()
    tools = [Path(x) for x in (COMPILER, *(shutil.which(x) for x in ("cc", "gcc", "g++", "as", "ld", "sh"))) if x]
    for tool in tools:
        (bare / tool.name).symlink_to(tool)
    said = run(tree, "setup.py", "build_ext", "--inplace", **({} if nvcc else {"PATH": str(bare)}), **env)
    return said, {path.name for path in (tree / "kernels" / "meanflow_kernels").glob("*.so")}


def step_in(tree: Path) -> str:
    """Step an optimizer of the tree's package; returns what is said, the missing libraries among it."""
    code = (
        "import torch; from meanflow_kernels.adamw_ema import AdamWEMA, native;"
        "print(native.__file__, sorted(native.MISSING));"
        "w = torch.nn.Parameter(torch.ones(3)); w.grad = torch.ones(3); AdamWEMA([w], lr=0.5, weight_decay=0.0).step();"
        "print([round(x, 4) for x in w.tolist()])"
    )
    said = run(tree, "-c", code, PYTHONPATH=str(tree / "kernels"))
    assert str(tree) in said and "[0.5, 0.5, 0.5]" in said
    return said


@needs_compiler
def test_compiler_and_no_nvcc(tree):
    said, libraries = build(tree)
    assert libraries == {"native_cpu.so"} and "is not built" not in said
    assert "['cuda']" in step_in(tree)


def test_no_compiler(tree):
    """A warning, and a package that works."""
    said, libraries = build(tree, CXX="/nonexistent/c++")
    assert said.count("is not built") == 1 and "--no-build-isolation" in said
    assert libraries == set()
    said = step_in(tree)
    assert "['cpu', 'cuda']" in said and said.count("RuntimeWarning: adamw_ema runs on plain torch") == 1


@needs_compiler
def test_source_that_does_not_compile(tree):
    (tree / "csrc" / "adamw_ema_cpu.cpp").write_text("#error no\n")
    said, libraries = build(tree)
    assert "native_cpu is not built (the compiler failed, see above)" in said and "#error no" in said
    assert libraries == set()


def test_no_torch(tree):
    """As in an isolated build."""
    stub = tree / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch here')\n")
    said, libraries = build(tree, PYTHONPATH=str(stub))
    assert "is not built (no torch here)" in said and libraries == set()


@needs_nvcc
@pytest.mark.slow
def test_nvcc_and_no_gpu(tree):
    """Both libraries, which load beside any torch."""
    said, libraries = build(tree, nvcc=True, **({"CUDA_HOME": str(NVCC.parents[1])} if isinstance(NVCC, Path) else {}))
    assert libraries == {"native_cpu.so", "native_cuda.so"}, said
    assert "[]" in step_in(tree)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_does_not_spill_and_moves_sixteen_bytes_at_a_time(arch):
    # of the installed library: scripts/setup.sh builds it again where a source changed
    library = ROOT / "kernels" / "meanflow_kernels" / "native_cuda.so"
    folder = find_spec("triton").submodule_search_locations[0] if find_spec("triton") else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which(Path(folder, "backends", "nvidia", "bin", "cuobjdump"))
    if not library.exists() or cuobjdump is None:
        pytest.skip(f"needs {library.name}, which nvcc builds, and cuobjdump, of the CUDA toolkit or of triton")

    def dump(what: str) -> str:
        return subprocess.run(
            [cuobjdump, "-arch", arch, what, library], capture_output=True, text=True, check=True
        ).stdout

    usage = dump("-res-usage")
    kernels = re.findall(r"adamw_ema_kernelILi(\d)E.*\n\s*REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    assert len(kernels) == 5, usage
    assert all(stack == local == "0" for _, _, stack, local in kernels), usage
    # up to two averages leave three programs of 256 threads on an SM, more of them two
    assert all(int(registers) <= (80 if int(emas) <= 2 else 128) for emas, registers, _, _ in kernels), usage
    kernels = dump("-sass").split("Function : ")[1:]
    assert len(kernels) == 5
    for kernel in kernels:
        emas = int(re.match(r"\S*adamw_ema_kernelILi(\d)E", kernel)[1])
        loads, stores = (len(re.findall(rf"{op}\.E\.128", kernel)) for op in ("LDG", "STG"))
        assert loads >= 4 + emas and stores >= 3 + emas, (emas, loads, stores)


def test_source_distribution_holds_csrc(tree):
    run(tree, "setup.py", "-q", "sdist")
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert "kernels/meanflow_kernels/adamw_ema/op.py" in names
