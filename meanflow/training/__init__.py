"""The training loop and what it is made of."""

import importlib


def __getattr__(name: str):
    """What meanflow.training had as one module, now in :mod:`meanflow.training.trainer`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.trainer"), name)
