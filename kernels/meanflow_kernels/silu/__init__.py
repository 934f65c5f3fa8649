"""The silu operator."""

from .op import silu, silu_jvp, compile_cases

__all__ = ["silu", "silu_jvp", "compile_cases"]
