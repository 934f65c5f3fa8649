"""The training loop and what it is made of."""

import importlib


def __getattr__(name: str):
    """Find the names of the former module meanflow.training in :mod:`meanflow.training.trainer`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.trainer"), name)
