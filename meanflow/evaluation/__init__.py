"""Scores of samples: features, distances, protocols."""

import importlib


def __getattr__(name: str):
    """Find the names of the former module meanflow.evaluation in :mod:`meanflow.evaluation.evaluator`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.evaluator"), name)
