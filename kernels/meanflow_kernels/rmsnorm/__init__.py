"""The rmsnorm operator."""

from .op import compile_cases, rmsnorm, rmsnorm_jvp

__all__ = ["rmsnorm", "rmsnorm_jvp", "compile_cases"]
