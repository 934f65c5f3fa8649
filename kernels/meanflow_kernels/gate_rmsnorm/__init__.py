"""The gate_rmsnorm operator."""

from .op import gate_rmsnorm, gate_rmsnorm_jvp

__all__ = ["gate_rmsnorm", "gate_rmsnorm_jvp"]
