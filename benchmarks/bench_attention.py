"""Softmax attention: ours, SDPA's backends, math attention under torch.func.jvp, and the peers that are installed."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from meanflow_kernels import attention, attention_jvp
from meanflow_kernels.attention import Backend, config, force_backend
from meanflow_kernels.attention.backends import serves
from meanflow_kernels.counts import attention_bwd_flops, attention_flops, attention_tangent_flops
from meanflow_kernels.launch import arch_of
from meanflow_kernels.routing import overriding

from .workloads import plain
from .workloads.operator_variants import VARIANTS, Case, backward_of, measure
from .workloads.shapes import ATTENTION, Shape, naming, size_for


def _sdpa(backend: SDPBackend) -> Callable:
    def run(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return run


def _sdpa_primal(backend: SDPBackend, case: Case) -> Callable:
    run = functools.partial(_sdpa(backend), *case.primals)
    try:
        run()
    except RuntimeError as error:
        pytest.skip(f"SDPA has no {backend.name} here: {error}")
    return run


def _sdpa_backward(backend: SDPBackend, case: Case) -> Callable:
    _sdpa_primal(backend, case)
    inputs = [x.detach().requires_grad_() for x in case.primals]
    o = _sdpa(backend)(*inputs)
    do = torch.randn_like(o)
    return lambda: (torch.autograd.grad(o, inputs, do, retain_graph=True), [do])


def _sdpa_func_jvp(case: Case) -> Callable:
    # what the public trainers run: SDPA has forward AD in this backend alone
    return lambda: torch.func.jvp(_sdpa(SDPBackend.MATH), case.primals, case.tangents)


def _flash_attn(case: Case) -> Callable:
    interface = pytest.importorskip("flash_attn.flash_attn_interface", reason="flash-attn is not installed")
    return lambda: interface.flash_attn_func(*case.primals)


def _xformers(case: Case) -> Callable:
    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed")
    return lambda: ops.memory_efficient_attention(*case.primals)


def _jvp_flash_attention(case: Case) -> Callable:
    peer = pytest.importorskip("jvp_flash_attention.jvp_attention", reason="jvp_flash_attention is not installed")
    if case.primals[0].shape[-1] not in (16, 32, 64, 128, 256):
        pytest.skip(f"jvp_flash_attention has no head dim {case.primals[0].shape[-1]}")
    # its layout, (B, H, N, D) contiguous, is made before the clock starts
    primals, tangents = (tuple(x.transpose(1, 2).contiguous() for x in xs) for xs in (case.primals, case.tangents))
    return lambda: tuple(x.transpose(1, 2) for x in torch.func.jvp(peer.JVPAttn.fwd_dual, primals, tangents))


def _ours_by(backend: Backend, call: str, case: Case) -> Callable:
    q, k, _ = case.primals
    if not (q.is_cuda and serves(backend, q, k)):
        pytest.skip(f"{backend.value} is not installed or does not serve this device")
    build = {"primal": lambda: case.op(*case.primals), "backward": backward_of(case.op, case)}[call]

    def run():
        with force_backend(**{"forward" if call == "primal" else "backward": backend}):
            return build()

    return run


BACKENDS = {
    f"ours by {backend.value}, {call}": (call, functools.partial(_ours_by, backend, call))
    for backend in Backend
    for call in ("primal", "backward")
}
"""The backends that the tables of attention/config.py choose from."""


def _ours_from(rows: config.Rows, case: Case) -> Callable:
    q = case.primals[0]
    if arch_of(q.device) != 90 or not config.serves(config.PERSISTENT, q.dtype, q.shape[-1], every=True):
        pytest.skip("the persistent kernel is of sm_90; without it ours is the one in tiles")
    build = VARIANTS["ours"][1](case)

    def run():
        with overriding(config, DUAL_90=rows):
            return build()

    return run


TILES = tuple(row for row in config.DUAL_90 if isinstance(row[2], config.AttentionConfig))
KERNELS = {
    "ours in tiles, dual": ("dual", functools.partial(_ours_from, TILES)),
    "ours persistent, dual": ("dual", functools.partial(_ours_from, ((72, 0, config.PERSISTENT), *TILES))),
}
"""Our kernels that the table of sm_90 chooses from."""

PEERS = {
    "sdpa math, func.jvp": ("dual", _sdpa_func_jvp),
    "jvp_flash_attention": ("dual", _jvp_flash_attention),
    "sdpa flash": ("primal", functools.partial(_sdpa_primal, SDPBackend.FLASH_ATTENTION)),
    "sdpa cudnn": ("primal", functools.partial(_sdpa_primal, SDPBackend.CUDNN_ATTENTION)),
    "sdpa math": ("primal", functools.partial(_sdpa_primal, SDPBackend.MATH)),
    "flash-attn": ("primal", _flash_attn),
    "xformers": ("primal", _xformers),
    "sdpa flash, backward": ("backward", functools.partial(_sdpa_backward, SDPBackend.FLASH_ATTENTION)),
    "sdpa cudnn, backward": ("backward", functools.partial(_sdpa_backward, SDPBackend.CUDNN_ATTENTION)),
}


ALL = VARIANTS | BACKENDS | KERNELS | PEERS


def _flops(shape: Shape) -> dict[str, int]:
    sizes = (shape.heads, shape.tokens, shape.tokens, shape.head_dim)
    primal = attention_flops(shape.batch, *sizes)
    return {
        "primal": primal,
        "dual": primal + attention_tangent_flops(shape.batch, *sizes),
        "quarter": primal + attention_tangent_flops(max(1, shape.batch // 4), *sizes),
        "backward": attention_bwd_flops(shape.batch, *sizes),
    }


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("regime", ATTENTION)
def test_attention(benchmark, timer, device, regime, variant):
    shape = size_for(device, ATTENTION[regime])
    # q, k and v are read where the qkv projection left them
    size = (2, shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    packed, packed_dot = torch.randn(size, device=device, dtype=torch.bfloat16)
    case = Case(attention, attention_jvp, plain.attention, packed.unbind(2), packed_dot.unbind(2), flops=_flops(shape))
    name = naming("attention", regime, shape, packed.dtype, variant)
    measure(timer, benchmark, case, name, *ALL[variant])
