"""Our folder kernels/ beside Hugging Face's package `kernels`, installed editable and normally, at the root or not."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = """
import meanflow, meanflow_kernels
import meanflow.model.transformer
assert meanflow.model.transformer.linear_jvp is meanflow_kernels.linear_jvp  # not imported a second time
print(meanflow_kernels.__file__)
"""
# where our folder kernels/ lies beside
THEIRS = """
from kernels import get_kernel
import diffusers, kernels
from diffusers import AutoencoderKL
assert callable(get_kernel) and "site-packages" in kernels.__file__, kernels.__file__
"""


def has(package: str) -> bool:
    try:
        return bool(distribution(package))
    except PackageNotFoundError:
        return False


needs_hugging_face = pytest.mark.skipif(
    not (has("kernels") and has("diffusers")), reason="Hugging Face's kernels and diffusers are not installed"
)


def run_imports(cwd: Path, *path: Path) -> Path:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    imports = THEIRS + OURS if cwd == ROOT else OURS
    done = subprocess.run([sys.executable, "-c", imports], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1])


@needs_hugging_face
def test_editable_install(tmp_path):
    if not has("meanflow"):
        pytest.skip("runs from the source tree, not installed")
    for cwd in (ROOT, tmp_path):
        assert run_imports(cwd).is_relative_to(ROOT / "kernels")


@needs_hugging_face
def test_normal_install(tmp_path):
    site = tmp_path / "site"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "meanflow", "kernels", "csrc"):
        (source / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        source,
    ]
    # without a compiler: the native part has a test of its own
    env = os.environ | {"CXX": "false", "CUDA_HOME": str(tmp_path / "none")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    # not from our folder beside; the command below imports them elsewhere
    assert run_imports(ROOT, site).is_relative_to(site)
    installed = {path.relative_to(site) for path in (site / "meanflow").rglob("*") if "__pycache__" not in path.parts}
    files = {path.relative_to(ROOT) for path in (ROOT / "meanflow").rglob("*.*") if path.suffix not in (".pyc", ".md")}
    assert files <= installed, files - installed
    commands = sorted(
        path.stem for path in (ROOT / "meanflow" / "apps").glob("*.py") if "run = partial" in path.read_text()
    )
    assert len(commands) == 11
    programs = {path.name for path in (site / "bin").iterdir()}
    assert programs == {f"meanflow-{name.replace('_', '-')}" for name in commands}
    help = subprocess.run(
        [site / "bin" / "meanflow-train", "--help"], cwd=tmp_path, env=env | {"PYTHONPATH": str(site)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert help.returncode == 0 and "imagenet-xl2" in help.stdout, help.stderr
