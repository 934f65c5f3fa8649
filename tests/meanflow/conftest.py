"""Shared by the rooms' tests."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks()
    yield processes
    processes.stop()
