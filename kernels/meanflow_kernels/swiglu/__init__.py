"""The swiglu operator."""

from .op import compile_cases, swiglu, swiglu_jvp

__all__ = ["swiglu", "swiglu_jvp", "compile_cases"]
