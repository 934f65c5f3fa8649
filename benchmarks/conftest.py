"""Kernel benches under pytest-benchmark: ``pytest benchmarks/bench_*.py --rows FILE``.

On a GPU the shapes are those of the models; on a CPU they are tiny, and show only that the benches run.
"""

from pathlib import Path

import pytest
import torch

from .harness.arbiter import alone, join
from .harness.clock import measure_ceilings
from .harness.environment import environment
from .harness.operator_timer import OperatorTimer


def pytest_addoption(parser):
    group = parser.getgroup("kernel benches")
    group.addoption("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    group.addoption("--rows", type=Path, metavar="FILE", help="append the rows to FILE as JSON lines")
    group.addoption("--commit", help="what the rows say of the source, where it is no git checkout")
    group.addoption("--turns", type=int, metavar="FD", help="where the suite that started the benches gives turns")


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    """Where the benches run."""
    return pytestconfig.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def timer(pytestconfig, device):
    """The rows of this session, the ceilings of its device measured first."""
    join(pytestconfig.getoption("--turns"))
    found = environment(device, pytestconfig.getoption("--commit"))
    with alone(device):
        ceilings = measure_ceilings(device)
    pytestconfig.timer = OperatorTimer(device, found, ceilings, pytestconfig.getoption("--rows"))
    return pytestconfig.timer


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget compiled graphs before each bench."""
    torch.manual_seed(0)
    torch.compiler.reset()


def pytest_terminal_summary(terminalreporter, config):
    timer = getattr(config, "timer", None)
    if timer is not None and timer.rows:
        terminalreporter.section("device time, cold cache")
        terminalreporter.write_line(timer.summary())
