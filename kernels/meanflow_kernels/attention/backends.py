"""Attention where no tangent is: which implementation serves a forward or a backward, and how each is called.

SDPA's cuDNN and flash attention ship with torch, flash-attn and xformers are optional packages, and the Triton kernels
serve what no library does: fp32, and GPUs older than sm_80. The forward gives o and the natural logarithm lse of the
softmax's sums; any backward takes those of any forward. All read q, k and v by strides and give contiguous results.
"""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from ..launch import Launch, arch_of
from ..plans import run
from ..routing import overriding
from .config import BACKWARD, Backend, Backends, backward_configs, plain_config, preferred
from .launches import aligned, backward_launches, forward_launch, pack_launches

Triple = tuple[Tensor, Tensor, Tensor]
_REPEATABLE = (Backend.FLASH, Backend.FLASH_ATTN, Backend.TRITON)
"""Backwards with the same bits in every run where torch asks for deterministic algorithms; every forward has them."""


class _Forced:
    forward: Backend | None = None
    backward: Backend | None = None


_forced = _Forced()


@contextlib.contextmanager
def force_backend(*, forward: Backend | None = None, backward: Backend | None = None) -> Iterator[None]:
    """Serve the scope's kernel calls by one implementation, for benches and tests; None leaves the choice; scopes nest.

    Raises:
        ValueError: no :class:`Backend`; and from the call itself, where it does not serve that.
    """
    for name, backend in (("forward", forward), ("backward", backward)):
        if backend is not None and not isinstance(backend, Backend):
            raise ValueError(f"{name}: got {backend!r}, wanted a Backend; pass one of {', '.join(map(str, Backend))}")
    with overriding(_forced, forward=forward or _forced.forward, backward=backward or _forced.backward):
        yield


def serves(backend: Backend, q: Tensor, k: Tensor) -> bool:
    """Whether an implementation is installed here and takes this device, dtype and shape."""
    if backend is Backend.TRITON:
        return True
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or arch_of(q.device) < 80 or not q.numel():
        return False
    match backend:
        case Backend.FLASH:
            return torch.backends.cuda.is_flash_attention_available()
        case Backend.CUDNN:
            # torch's own check: cuDNN attends to no single key
            return torch.backends.cudnn.enabled and torch.backends.cudnn.is_available() and k.shape[1] > 1
        case Backend.FLASH_ATTN:
            # flash-attn 4 alone makes `flash_attn` importable without this module
            return importlib.util.find_spec("flash_attn") is not None and _has("flash_attn.flash_attn_interface")
        case Backend.XFORMERS:
            return _has("xformers.ops")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _strict() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _choose(table: Backends, q: Tensor, k: Tensor) -> Backend:
    """The forced implementation, else the first of the table's that serves, repeatable where torch asks for that."""
    backward = table is BACKWARD
    forced = _forced.backward if backward else _forced.forward
    allowed = _REPEATABLE if backward and _strict() else tuple(Backend)
    if forced is None:
        order = preferred(table, arch_of(q.device), q.shape[-1], min(q.shape[1], k.shape[1]))
        return next((x for x in order if x in allowed and serves(x, q, k)), Backend.TRITON)
    if forced not in allowed:
        raise ValueError(
            f"force_backend: got {forced} under torch.use_deterministic_algorithms(True), wanted a backward that is "
            f"deterministic; use one of {', '.join(map(str, _REPEATABLE))}"
        )
    if not serves(forced, q, k):
        raise ValueError(
            f"force_backend: got {forced}, wanted one that is installed and serves {q.dtype} on {q.device}; leave the "
            "scope or use Backend.TRITON"
        )
    return forced


def _readable(x: Tensor) -> Tensor:
    """``x`` as every library reads it: as the kernels do, and no dimension expanded."""
    expanded = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if expanded else aligned(x)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, table: Backends, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """o (B, M, H, D), contiguous, and lse (B, H, M) fp32, by the implementation that ``table`` prefers.

    Written into ``out`` where it is given, which costs a copy of what a library makes.
    """
    backend = _choose(table, q, k)
    if backend is Backend.TRITON:
        o, lse = empty_outputs(q) if out is None else out
        run(_plain_launch, q, k, v, o, lse, scale)
        return o, lse
    forward = {Backend.FLASH_ATTN: _flash_attn_forward, Backend.XFORMERS: _xformers_forward}.get(backend)
    inputs = _readable(q), _readable(k), _readable(v)
    o, lse = forward(*inputs, scale) if forward else _sdpa_forward(backend, *inputs, scale)
    if out is None:
        return o.contiguous(), lse.contiguous()
    return out[0].copy_(o), out[1].copy_(lse)


def _plain_launch(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Launch:
    config = plain_config(arch_of(q.device), q.dtype, q.shape[-1], q.shape[1])
    return forward_launch((aligned(q), aligned(k), aligned(v)), (None, None, None), (o, None, lse), scale, config)


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, M, H, D) contiguous in q's dtype, lse (B, H, M) fp32."""
    batch, m, heads, _ = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    return o, o.new_empty((batch, heads, m), dtype=torch.float32)


def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> Triple:
    """Gradients of o (B, M, H, D) with respect to q, k and v, contiguous; lse (B, H, M) is the natural logarithm."""
    backend = _choose(BACKWARD, q, k)
    if backend is not Backend.TRITON:
        return _library_backward(backend, do, q, k, v, o, lse, scale)
    out = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    run(_backward_launches, do, q, k, v, o, lse, torch.empty_like(lse), scale, out)
    return out


def attention_qkv_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, dqkv: Tensor, dbias: Tensor | None
) -> None:
    """The same of qkv (B, L, 3, H, D), into dqkv, contiguous; a library's results are packed into it.

    Into dbias (3 H D,), where it is given, the gradient of a bias that qkv contains.
    """
    q, k, v = qkv.unbind(2)
    backend = _choose(BACKWARD, q, k)
    if backend is Backend.TRITON:
        run(_backward_launches, do, q, k, v, o, lse, torch.empty_like(lse), scale, dqkv.unbind(2), dbias)
        return
    run(pack_launches, _library_backward(backend, do, q, k, v, o, lse, scale), dqkv, dbias)


def _library_backward(backend, do, q, k, v, o, lse, scale) -> Triple:
    backward = {Backend.FLASH_ATTN: _flash_attn_backward, Backend.XFORMERS: _xformers_backward}.get(backend)
    inputs = (aligned(do.contiguous()), *(_readable(x) for x in (q, k, v)), o, lse, scale)
    dq, dk, dv = backward(*inputs) if backward else _sdpa_backward(backend, *inputs)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _sdpa_forward(backend, q, k, v, scale):
    aten = torch.ops.aten
    # (B, H, L, D) views
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is Backend.FLASH:
        o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    else:
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    # cuDNN's is (B, H, M, 1)
    return o.transpose(1, 2), lse.view(o.shape[:3])


def _sdpa_backward(backend, do, q, k, v, o, lse, scale):
    aten = torch.ops.aten
    # (B, H, L, D) views; without dropout the generator's state is not read
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2], 0.0, False)
    if backend is Backend.FLASH:
        backward = aten._scaled_dot_product_flash_attention_backward
        gradients = backward(do, q, k, v, o, lse, *lengths, seed, seed, scale=scale)
    else:
        backward = aten._scaled_dot_product_cudnn_attention_backward
        # cuDNN describes the statistics to its graph by their own sizes: (B, H, M, 1)
        gradients = backward(do, q, k, v, o, lse[..., None], seed, seed, None, *lengths, scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)


_FLASH_ATTN = {"dropout_p": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}


def _flash_attn_forward(q, k, v, scale):
    from flash_attn.flash_attn_interface import _flash_attn_forward

    options = {"softmax_scale": scale, "alibi_slopes": None, "return_softmax": False}
    o, lse, *_ = _flash_attn_forward(q, k, v, **_FLASH_ATTN, **options)
    return o, lse


def _flash_attn_backward(do, q, k, v, o, lse, scale):
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    options = {"softmax_scale": scale, "alibi_slopes": None, "deterministic": _strict()}
    _flash_attn_backward(do, q, k, v, o, lse, dq, dk, dv, **_FLASH_ATTN, **options)
    return dq, dk, dv


def _xformers_forward(q, k, v, scale):
    from xformers.ops import fmha

    o, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale, op=fmha.cutlass.FwOp)
    return o, lse[..., : q.shape[1]]


def _xformers_backward(do, q, k, v, o, lse, scale):
    from xformers.ops import fmha

    # its CUTLASS backward reads lse in rows padded to 32
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return fmha.memory_efficient_attention_backward(do, o, lse, q, k, v, scale=scale, op=fmha.cutlass.BwOp)


def _backward_launches(do, q, k, v, o, lse, delta, scale, out, dbias=None) -> Iterator[Launch]:
    saved = (aligned(q), aligned(k), aligned(v), o, lse)
    configs = backward_configs(arch_of(q.device), q.dtype, q.shape[-1], q.shape[1])
    return backward_launches(aligned(do), saved, delta, out, scale, configs, dbias)
