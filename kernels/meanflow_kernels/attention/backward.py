"""The primal's backward: which implementation serves a call, each fed with o and the natural-log lse of the forward.

SDPA's flash and cuDNN backwards ship with torch, flash-attn and xformers are optional packages, and the Triton kernels
serve what no library does: fp32, and GPUs older than sm_80. All read q, k and v by strides and give contiguous
gradients.
"""

import contextlib
import enum
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from ..launch import arch_of
from .config import backward_configs
from .launches import aligned, backward_launches


class Backward(enum.Enum):
    """An implementation of attention's backward."""

    FLASH = "SDPA flash"
    CUDNN = "SDPA cuDNN"
    FLASH_ATTN = "flash-attn"
    XFORMERS = "xformers"
    TRITON = "Triton"


class _Override:
    backward: Backward | None = None


_override = _Override()


@contextlib.contextmanager
def force_backward(backward: Backward) -> Iterator[None]:
    """Serve every backward of the scope's kernel calls by one implementation, for benches and tests; scopes nest.

    Raises:
        ValueError: no :class:`Backward`; and from the backward itself, where it does not serve the call.
    """
    if not isinstance(backward, Backward):
        raise ValueError(f"backward: got {backward!r}, wanted a Backward; pass one of {', '.join(map(str, Backward))}")
    outer = _override.backward
    _override.backward = backward
    try:
        yield
    finally:
        _override.backward = outer


def serves(backward: Backward, q: Tensor) -> bool:
    """Whether an implementation is installed here and takes ``q``'s device and dtype."""
    if backward is Backward.TRITON:
        return True
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or arch_of(q.device) < 80:
        return False
    match backward:
        case Backward.FLASH:
            return torch.backends.cuda.is_flash_attention_available()
        case Backward.CUDNN:
            return torch.backends.cudnn.is_available()
        case Backward.FLASH_ATTN:
            # flash-attn 4 alone makes `flash_attn` importable without this module
            return importlib.util.find_spec("flash_attn") is not None and _has("flash_attn.flash_attn_interface")
        case Backward.XFORMERS:
            return _has("xformers.ops")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _choose(q: Tensor) -> Backward:
    # flash is the one library backward whose interface holds from torch 2.11 on every GPU from sm_80; the others wait
    # for a measurement
    if _override.backward is None:
        return Backward.FLASH if serves(Backward.FLASH, q) else Backward.TRITON
    if not serves(_override.backward, q):
        raise ValueError(
            f"force_backward: got {_override.backward}, wanted one that is installed and serves {q.dtype} on "
            f"{q.device}; leave the scope or use Backward.TRITON"
        )
    return _override.backward


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o (B, M, H, D) with respect to q, k and v, contiguous; lse (B, H, M) is the natural logarithm."""
    match _choose(q):
        case Backward.TRITON:
            gradients = _triton(do, q, k, v, o, lse, scale)
        case Backward.FLASH_ATTN:
            gradients = _flash_attn(do, q, k, v, o, lse, scale)
        case Backward.XFORMERS:
            gradients = _xformers(do, q, k, v, o, lse, scale)
        case library:
            gradients = _sdpa(library, do, q, k, v, o, lse, scale)
    return tuple(x.contiguous() for x in gradients)


def _sdpa(library, do, q, k, v, o, lse, scale):
    aten = torch.ops.aten
    # (B, H, L, D) views; without dropout the generator's state is not read
    do, q, k, v, o = (x.transpose(1, 2) for x in (do.contiguous(), q, k, v, o))
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2], 0.0, False)
    if library is Backward.FLASH:
        backward = aten._scaled_dot_product_flash_attention_backward
        gradients = backward(do, q, k, v, o, lse, *lengths, seed, seed, scale=scale)
    else:
        backward = aten._scaled_dot_product_cudnn_attention_backward
        # cuDNN describes the statistics to its graph by their own sizes: (B, H, M, 1)
        gradients = backward(do, q, k, v, o, lse[..., None], seed, seed, None, *lengths, scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)


def _flash_attn(do, q, k, v, o, lse, scale):
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _flash_attn_backward(
        *(do.contiguous(), q, k, v, o, lse, dq, dk, dv),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    )
    return dq, dk, dv


def _xformers(do, q, k, v, o, lse, scale):
    from xformers.ops import fmha

    # its CUTLASS backward reads lse in rows padded to 32
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return fmha.memory_efficient_attention_backward(do.contiguous(), o, lse, q, k, v, scale=scale, op=fmha.cutlass.BwOp)


def _triton(do, q, k, v, o, lse, scale):
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    saved = (aligned(q), aligned(k), aligned(v), o, lse)
    configs = backward_configs(arch_of(q.device), q.dtype, q.shape[-1])
    for launch in backward_launches(aligned(do), saved, torch.empty_like(lse), gradients, scale, configs):
        launch.run()
    return gradients
