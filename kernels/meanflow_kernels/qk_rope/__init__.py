"""The qk_rope operator."""

from .op import compile_cases, qk_rope, qk_rope_jvp

__all__ = ["qk_rope", "qk_rope_jvp", "compile_cases"]
