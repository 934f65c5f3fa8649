"""The gate_adaln operator."""

from .op import compile_cases, gate_adaln, gate_adaln_jvp

__all__ = ["gate_adaln", "gate_adaln_jvp", "compile_cases"]
