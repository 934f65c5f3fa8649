"""The gate_rmsnorm operator."""

from .op import compile_cases, gate_rmsnorm, gate_rmsnorm_jvp

__all__ = ["gate_rmsnorm", "gate_rmsnorm_jvp", "compile_cases"]
