"""The house: which room may import which, and that nobody imports those who look in from outside."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# knowledge flows csrc -> kernels -> meanflow -> scripts
ROOMS = {  # folder: the project's own modules it may import
    "kernels": {"meanflow_kernels"},
    "meanflow": {"meanflow_kernels", "meanflow"},
    "scripts": {"meanflow_kernels", "meanflow"},
    "benchmarks": {"meanflow_kernels", "meanflow", "benchmarks"},
}
OURS = {"meanflow_kernels", "meanflow", "benchmarks", "tests", "scripts", "oracle", "runs", "caches", "fid_inputs"}


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_direction(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not imports(path) & OURS - ROOMS[room], path


def test_top_level():
    for name in ("README.md", "setup.py", "csrc", "meanflow", "kernels", "benchmarks", "tests", "scripts"):
        assert (ROOT / name).exists(), name
    # Hugging Face's package `kernels` keeps its name: the folder is none
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_is_unpickled():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            for call in calls:
                name = ast.unparse(call.func)
                # weights_only reads tensors and plain containers, and runs nothing
                tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                assert name != "torch.load" or tensors_only, path
                assert name not in ("pickle.load", "pickle.loads"), path
                allowed = [k for k in call.keywords if k.arg == "allow_pickle" and ast.unparse(k.value) != "False"]
                assert not allowed, path
