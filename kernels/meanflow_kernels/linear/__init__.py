"""The linear operator."""

from .op import chunks, linear, linear_jvp

__all__ = ["chunks", "linear", "linear_jvp"]
