"""The timestep_embedding operator."""

from .op import timestep_embedding, timestep_embedding_jvp, compile_cases

__all__ = ["timestep_embedding", "timestep_embedding_jvp", "compile_cases"]
