"""Forward-mode operators for diffusion transformers: each on a tensor, and on an explicit (primal, tangent) pair."""

from .adaln import adaln, adaln_jvp
from .attention import attention, attention_jvp, attention_qkv, attention_qkv_jvp
from .bias_gelu import bias_gelu, bias_gelu_jvp
from .dual import TangentGradientError
from .gate_adaln import gate_adaln, gate_adaln_jvp
from .gate_rmsnorm import gate_rmsnorm, gate_rmsnorm_jvp
from .linear import linear, linear_jvp
from .qk_rope import qk_rope, qk_rope_jvp
from .rmsnorm import rmsnorm, rmsnorm_jvp
from .routing import Route, force_route
from .silu import silu, silu_jvp
from .swiglu import swiglu, swiglu_jvp
from .timestep_embedding import timestep_embedding, timestep_embedding_jvp

# last: it registers the FLOPs of the operators above
# isort: split
from . import counts

__all__ = [
    "Route",
    "TangentGradientError",
    "adaln",
    "adaln_jvp",
    "attention",
    "attention_jvp",
    "attention_qkv",
    "attention_qkv_jvp",
    "bias_gelu",
    "bias_gelu_jvp",
    "force_route",
    "gate_adaln",
    "gate_adaln_jvp",
    "gate_rmsnorm",
    "gate_rmsnorm_jvp",
    "linear",
    "linear_jvp",
    "qk_rope",
    "qk_rope_jvp",
    "rmsnorm",
    "rmsnorm_jvp",
    "silu",
    "silu_jvp",
    "swiglu",
    "swiglu_jvp",
    "timestep_embedding",
    "timestep_embedding_jvp",
]
