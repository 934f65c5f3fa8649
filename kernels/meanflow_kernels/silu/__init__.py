"""The silu operator."""

from .op import silu, silu_jvp

__all__ = ["silu", "silu_jvp"]
