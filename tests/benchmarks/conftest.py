"""Shared by the benches' tests."""

import pytest

from meanflow import recipe


@pytest.fixture
def narrow(monkeypatch):
    """Two narrow blocks in the place of S's twelve: enough where the rows of a step are tested, and not the step."""
    monkeypatch.setitem(recipe.DIT_SIZES, "S", (2, 64, 2))
