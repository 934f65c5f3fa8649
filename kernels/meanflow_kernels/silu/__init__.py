"""The silu operator."""

from .op import compile_cases, silu, silu_jvp

__all__ = ["silu", "silu_jvp", "compile_cases"]
