"""The attention operator."""

from .backends import force_backend
from .config import Backend
from .launches import compile_cases
from .op import attention, attention_jvp, attention_qkv, attention_qkv_jvp

__all__ = [
    "Backend",
    "attention",
    "attention_jvp",
    "attention_qkv",
    "attention_qkv_jvp",
    "compile_cases",
    "force_backend",
]
