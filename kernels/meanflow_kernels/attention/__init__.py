"""The attention operator."""

from .backward import Backward, force_backward
from .launches import compile_cases
from .op import attention, attention_jvp

__all__ = ["Backward", "attention", "attention_jvp", "compile_cases", "force_backward"]
