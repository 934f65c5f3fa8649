"""The qk_rope operator."""

from .op import qk_rope, qk_rope_jvp

__all__ = ["qk_rope", "qk_rope_jvp"]
