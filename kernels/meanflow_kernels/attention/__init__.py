"""The attention operator."""

from .launches import compile_cases
from .op import attention, attention_jvp

__all__ = ["attention", "attention_jvp", "compile_cases"]
