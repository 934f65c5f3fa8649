"""The attention operator."""

from .backends import force_backend
from .config import Backend
from .op import attention, attention_jvp, attention_qkv, attention_qkv_jvp, compile_cases

__all__ = [
    "Backend",
    "attention",
    "attention_jvp",
    "attention_qkv",
    "attention_qkv_jvp",
    "compile_cases",
    "force_backend",
]
