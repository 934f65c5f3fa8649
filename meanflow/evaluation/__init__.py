"""Scores of samples: features, distances, protocols."""

import importlib


def __getattr__(name: str):
    """What meanflow.evaluation had as one module, now in :mod:`meanflow.evaluation.evaluator`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.evaluator"), name)
