"""The adaln operator."""

from .op import adaln, adaln_jvp, compile_cases

__all__ = ["adaln", "adaln_jvp", "compile_cases"]
