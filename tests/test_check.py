"""scripts/check.sh fails on a lint, a format and a type error, each alone, with the project's own configuration."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import ROOT

BIN = Path(sys.prefix, "bin")
SOUND = '''"""A public function."""

from torch import Tensor


def double(x: Tensor) -> Tensor:
    """Twice x."""
    return 2 * x
'''


@pytest.fixture
def check(tmp_path):
    """Check a package whose module ``double`` has this text: the exit code, and what was said."""
    missing = [tool for tool in ("ruff", "pyrefly") if not (BIN / tool).exists()]
    if missing:
        pytest.skip(f"needs the extra dev: no {' and '.join(missing)} here")

    def run(text: str, module: str = "meanflow/double.py") -> tuple[int, str]:
        for folder in ("scripts", "meanflow", "kernels/meanflow_kernels"):
            (tmp_path / folder).mkdir(parents=True)
        for name in ("pyproject.toml", "scripts/check.sh"):
            shutil.copy(ROOT / name, tmp_path / name)
        # this environment is the one that is set up
        (tmp_path / "scripts" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."\n')
        for package in ("meanflow", "kernels/meanflow_kernels"):
            (tmp_path / package / "__init__.py").touch()
        (tmp_path / module).write_text(text)
        environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
        command = ["bash", str(tmp_path / "scripts" / "check.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


def test_sound_package_passes(check):
    code, said = check(SOUND)
    assert code == 0, said


@pytest.mark.parametrize(
    ("package", "right", "wrong", "failed", "words"),
    [
        ("meanflow", "from torch", "import os\n\nfrom torch", "lint", "F401"),
        ("meanflow", "2 * x", "2*x", "format", "double.py"),
        ("meanflow", "return 2 * x", "return x.shape", "types", "bad-return"),
        ("kernels/meanflow_kernels", "return 2 * x", "return x.shape", "types", "bad-return"),
    ],
    ids=["lint", "format", "type", "type of an operator"],
)
def test_error_fails(check, package, right, wrong, failed, words):
    code, said = check(SOUND.replace(right, wrong), f"{package}/double.py")
    assert code == 1 and words in said
    assert f"check: failed: {failed};" in said
