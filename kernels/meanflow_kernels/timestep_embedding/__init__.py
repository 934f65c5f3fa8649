"""The timestep_embedding operator."""

from .op import compile_cases, timestep_embedding, timestep_embedding_jvp

__all__ = ["timestep_embedding", "timestep_embedding_jvp", "compile_cases"]
