"""The linear operator."""

from .op import linear, linear_jvp

__all__ = ["linear", "linear_jvp"]
