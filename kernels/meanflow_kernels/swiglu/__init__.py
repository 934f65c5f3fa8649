"""The swiglu operator."""

from .op import swiglu, swiglu_jvp

__all__ = ["swiglu", "swiglu_jvp"]
