"""Latents to train on: read, imported, encoded from images."""

import importlib


def __getattr__(name: str):
    """What meanflow.data had as one module, now in :mod:`meanflow.data.dataset`."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.dataset"), name)
