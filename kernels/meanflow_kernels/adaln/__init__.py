"""The adaln operator."""

from .op import adaln, adaln_jvp

__all__ = ["adaln", "adaln_jvp"]
