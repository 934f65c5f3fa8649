"""The gate_adaln operator."""

from .op import gate_adaln, gate_adaln_jvp, compile_cases

__all__ = ["gate_adaln", "gate_adaln_jvp", "compile_cases"]
