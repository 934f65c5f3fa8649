"""Sinusoidal time features on (primal, tangent) pairs."""

import torch
from torch import Tensor

from ..dual import absent, tangent_rows
from .reference import timestep_embedding_ref, timestep_embedding_tangent_ref


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """t (B,) in the dtype the features are computed in -> (B, dim), cosines then sines (DiT)."""
    return timestep_embedding_ref(t, dim, max_period)


def timestep_embedding_jvp(primals, tangents, dim: int, *, max_period: float = 10000.0, tangent_start: int | None = None):
    """timestep_embedding and its tangent: (t,), (t_dot,) -> features, features_dot."""
    features = timestep_embedding(*primals, dim, max_period=max_period)
    if absent(tangents):
        return features, None
    with torch.no_grad():
        (t,) = tangent_rows(primals, tangents, tangent_start)
        return features, timestep_embedding_tangent_ref(t, tangents[0], dim, max_period)
