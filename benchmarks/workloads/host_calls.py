"""Calls of operators whose time on the host is measured; of ours it imports the operators alone, of whichever tree."""

import json
import math
import sys
import time
from collections.abc import Callable

import torch

from meanflow_kernels import adaln_jvp, attention, attention_jvp, bias_gelu_jvp, gate_adaln_jvp

from ..harness.launching import nothing_launched

CALLS, WINDOWS = 20, 60
"""Calls of a window, which is timed as one, and windows of a turn."""
BATCH, TOKENS, HEADS, HEAD_DIM = 8, 256, 6, 64
WIDTH = HEADS * HEAD_DIM


def calls() -> dict[str, Callable[[], object]]:
    """What is timed, by name."""

    def stream(width: int = WIDTH, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(BATCH, TOKENS, width).to(dtype)

    def vectors(count: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(BATCH, 6 * WIDTH).half().chunk(6, -1)[:count]

    qkv, qkv_dot = (torch.randn(3, BATCH, TOKENS, HEADS, HEAD_DIM).half().unbind() for _ in range(2))
    quarter = tuple(x[-BATCH // 4 :] for x in qkv_dot)
    leaves = tuple(x.clone().requires_grad_() for x in qkv)
    x, x_dot = (stream(dtype=torch.float32) for _ in range(2))
    gated, gated_dot = ((x, stream(), *vectors(3)) for x in (x, x_dot))
    wide, wide_dot, bias = stream(4 * WIDTH), stream(4 * WIDTH), torch.randn(4 * WIDTH).half()
    inputs = tuple(each.clone().requires_grad_() for each in gated)
    h = gate_adaln_jvp(inputs, gated_dot, out_dtype=torch.float16)[0][1]
    dh = torch.randn_like(h)
    return {
        "attention, tangent": lambda: attention_jvp(qkv, qkv_dot),
        "attention, tangent, gradient": lambda: attention_jvp(leaves, qkv_dot),
        "attention, tangent of a quarter": lambda: attention_jvp(qkv, quarter, tangent_start=BATCH - BATCH // 4),
        "attention": lambda: attention(*qkv),
        "adaln, tangent": lambda: adaln_jvp((x, *gated[3:]), (x_dot, *gated_dot[3:])),
        "gate_adaln, tangent": lambda: gate_adaln_jvp(gated, gated_dot, out_dtype=torch.float16),
        "gate_adaln, backward": lambda: torch.autograd.grad(h, inputs, dh, retain_graph=True),
        "bias_gelu, tangent": lambda: bias_gelu_jvp((wide,), (wide_dot,), bias),
    }


def least(call: Callable[[], object]) -> float:
    """Microseconds that this thread works for a call: the mean of the fastest window."""
    best = math.inf
    for _ in range(WINDOWS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - start)
    return 1e6 * best / CALLS


def serve() -> None:
    """Time every call for each line on standard input, and answer with the microseconds by name."""
    torch.set_num_threads(1)
    with nothing_launched():
        timed = calls()
        for _ in sys.stdin:
            print(json.dumps({name: least(call) for name, call in timed.items()}), flush=True)
