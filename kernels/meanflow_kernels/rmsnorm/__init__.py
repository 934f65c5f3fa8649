"""The rmsnorm operator."""

from .op import rmsnorm, rmsnorm_jvp

__all__ = ["rmsnorm", "rmsnorm_jvp"]
