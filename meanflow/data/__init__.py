"""Latents to train on: read, imported, encoded from images."""

import importlib


def __getattr__(name: str):
    """Find the names of the former module meanflow.data in :mod:`meanflow.data.dataset`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.dataset"), name)
