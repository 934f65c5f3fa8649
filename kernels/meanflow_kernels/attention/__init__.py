"""The attention operator."""

from .op import attention, attention_jvp

__all__ = ["attention", "attention_jvp"]
