"""Shared by the tests of training."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks()
    yield processes
    processes.stop()
