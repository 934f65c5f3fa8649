"""Shared by all tests.

Kernels are tested on the GPU where there is one, elsewhere on the CPU in Triton's interpreter (fp32 and fp16; its bf16
is wrong). The interpreter has to be chosen before the first import of triton. Cross-compilation needs a process without
it: run it in a subprocess whose environment lacks TRITON_INTERPRET.
"""

import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from interpreter import spare_work

        spare_work()

LONG = ("test_end_to_end.py", "test_static_report.py", "test_step.py", "test_accounting.py")
"""Files that come first: begun last, one would keep a worker busy while the others have nothing left."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="long; run with --full"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture
def command(capsys, monkeypatch):
    """Run a command in this process: exit code, output, error output."""

    from meanflow import cli

    def run(name: str, *args: object) -> tuple[int, str, str]:
        main = importlib.import_module(f"meanflow.apps.{name}").main
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            cli.run(main)
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return run
