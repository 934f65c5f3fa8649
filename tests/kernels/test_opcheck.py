"""torch.library.opcheck of every registered operator: schema, fake tensors, autograd, and dynamic shapes in AOT."""

import functools

import pytest
import torch
from attention_inputs import make_inputs
from dual_properties import WITH_GRADIENT, WITHOUT_GRADIENT

from meanflow_kernels.adamw_ema.native import MISSING

ops = torch.ops.meanflow_kernels
F16, F32 = torch.float16, torch.float32


def random(*sizes, device) -> list:
    return [torch.randn(size, device=device) for size in sizes]


def vectors(count: int, device) -> tuple:
    """Chunks of a (B, 6 C) projection, as a DiT passes them."""
    return torch.randn(2, 6 * 8, device=device).chunk(6, -1)[1 : 1 + count]


def leaves(*primals) -> tuple:
    return tuple(x.clone().requires_grad_() for x in primals)


# of each operator's folder: its calls' arguments by name, those that opcheck may differentiate apart


def adaln(device):
    x, x_dot = random((2, 1, 8), (2, 1, 8), device=device)
    primals, tangents = (x, *vectors(2, device)), (x_dot, *vectors(2, device))
    some = (x_dot[1:], None, tangents[2][1:])
    yield "adaln", WITHOUT_GRADIENT, (*primals, 1e-6, F16)
    yield "adaln", WITHOUT_GRADIENT, (*leaves(*primals), 1e-6, F32)
    yield "adaln_jvp", WITHOUT_GRADIENT, (*primals, *some, 1, 1, 1e-6, F32)
    yield "adaln_jvp", WITH_GRADIENT, (*leaves(*primals), *tangents, 0, 2, 1e-6, F32)
    yield "adaln_bwd", WITHOUT_GRADIENT, (x, primals[2], x, 1e-6)


def gate_adaln(device):
    primals, tangents = (
        (*random((2, 1, 8), (2, 1, 8), device=device), *vectors(3, device)) for _ in range(2)
    )  # fmt: skip
    some = (tangents[0][1:], None, None, *[x[1:] for x in tangents[3:]])
    x, y, gate, _, scale = primals
    (bias,) = random((8,), device=device)
    yield "gate_adaln", WITHOUT_GRADIENT, (*primals, None, 1e-6, F16)
    yield "gate_adaln", WITHOUT_GRADIENT, (*leaves(*primals, bias), 1e-6, F32)
    yield "gate_adaln_jvp", WITHOUT_GRADIENT, (*primals, bias, *some, 1, 1, 1e-6, F32)
    yield "gate_adaln_jvp", WITH_GRADIENT, (*leaves(*primals), None, *tangents, 0, 2, 1e-6, F32)
    yield "gate_adaln_jvp", WITH_GRADIENT, (*leaves(*primals, bias), *tangents, 0, 2, 1e-6, F32)
    for dx_out, extra in ((x, None), (None, bias)):
        yield "gate_adaln_bwd", WITHOUT_GRADIENT, (x, y, gate, scale, extra, dx_out, y, 1e-6)


def rmsnorm(device):
    x, x_dot, weight = random((2, 1, 8), (2, 1, 8), (8,), device=device)
    yield "rmsnorm", WITHOUT_GRADIENT, (x, weight, 1e-6, F16)
    yield "rmsnorm", WITHOUT_GRADIENT, (*leaves(x, weight), 1e-6, F32)
    yield "rmsnorm_jvp", WITHOUT_GRADIENT, (x, weight, x_dot[1:], 1, 1e-6, F16)
    yield "rmsnorm_jvp", WITH_GRADIENT, (*leaves(x, weight), x_dot, 0, 1e-6, F32)
    yield "rmsnorm_bwd", WITHOUT_GRADIENT, (x, weight, x, 1e-6)


def gate_rmsnorm(device):
    x, y, x_dot, y_dot, gate, weight = random(*[(2, 1, 8)] * 4, (8,), (8,), device=device)
    primals = x, y, gate, weight
    yield "gate_rmsnorm", WITHOUT_GRADIENT, (*primals, 1e-6, F16)
    yield "gate_rmsnorm", WITHOUT_GRADIENT, (*leaves(*primals), 1e-6, F32)
    yield "gate_rmsnorm_jvp", WITHOUT_GRADIENT, (*primals, x_dot[1:], None, 1, 1, 1e-6, F32)
    yield "gate_rmsnorm_jvp", WITH_GRADIENT, (*leaves(*primals), x_dot, y_dot, 0, 2, 1e-6, F32)
    for dx_out in (x, None):
        yield "gate_rmsnorm_bwd", WITHOUT_GRADIENT, (*primals, dx_out, y, 1e-6)


def qk_rope(device):
    qk, qk_dot = (x[:, :, :2] for x in random(*[(2, 3, 3, 2, 8)] * 2, device=device))
    *weights, angles = random((8,), (8,), (3, 4), device=device)
    table = angles.cos(), angles.sin()
    yield "qk_rope", WITHOUT_GRADIENT, (qk, *weights, *table, 1e-6)
    yield "qk_rope", WITHOUT_GRADIENT, (*leaves(qk, *weights), *table, 1e-6)
    yield "qk_rope_jvp", WITHOUT_GRADIENT, (qk, *weights, *table, qk_dot[1:], 1, 1e-6)
    yield "qk_rope_jvp", WITH_GRADIENT, (*leaves(qk, *weights), *table, qk_dot, 0, 1e-6)
    yield "qk_rope_bwd", WITHOUT_GRADIENT, (qk, *weights, *table, *qk.unbind(2), 1e-6)


def swiglu(device):
    (x,) = random((3, 2, 8), device=device)
    yield "swiglu", WITHOUT_GRADIENT, leaves(x)
    yield "swiglu_jvp", WITHOUT_GRADIENT, (x, x[:2], 1)
    yield "swiglu_jvp", WITH_GRADIENT, (*leaves(x), x[:2], 1)
    yield "swiglu_bwd", WITHOUT_GRADIENT, (x, x[..., :4])


def join(device):
    yield "join", WITHOUT_GRADIENT, (random((2, 3), (2, 3), device=device),)


def bias_gelu(device):
    x, x_dot, bias = random((2, 3, 8), (1, 3, 8), (8,), device=device)
    yield "bias_gelu", WITHOUT_GRADIENT, leaves(x, bias)
    yield "bias_gelu_jvp", WITHOUT_GRADIENT, (x, bias, x_dot, 1)
    yield "bias_gelu_jvp", WITH_GRADIENT, (*leaves(x, bias), x_dot, 1)
    yield "bias_gelu_bwd", WITHOUT_GRADIENT, (x, bias, x)


def silu(device):
    (x,) = random((3, 8), device=device)
    yield "silu", WITHOUT_GRADIENT, leaves(x)
    yield "silu_jvp", WITHOUT_GRADIENT, (x, x[:2], 1)
    yield "silu_jvp", WITH_GRADIENT, (*leaves(x), x[:2], 1)
    yield "silu_bwd", WITHOUT_GRADIENT, (x, x)


def timestep_embedding(device):
    t, dy = random((3,), (3, 8), device=device)
    yield "timestep_embedding", WITHOUT_GRADIENT, (*leaves(t), 7, 1e4)
    yield "timestep_embedding_jvp", WITHOUT_GRADIENT, (t, t[:2], 8, 1, 1e4)
    yield "timestep_embedding_jvp", WITH_GRADIENT, (*leaves(t), t[:2], 8, 1, 1e4)
    yield "timestep_embedding_bwd", WITHOUT_GRADIENT, (t, dy, 1e4)


def attention(device):
    primals, tangents = make_inputs("iid", 2, 17, 33, 2, 24, F32, device)
    some = tuple(x[1:] for x in tangents[:2])
    o, lse = ops.attention(*primals, 0.3)
    yield "attention", WITHOUT_GRADIENT, (*primals, 0.3)
    yield "attention", WITH_GRADIENT, (*leaves(*primals), 0.3)
    yield "attention_jvp", WITHOUT_GRADIENT, (*primals, *some, None, 0.3, 1)
    yield "attention_jvp", WITH_GRADIENT, (*leaves(*primals), *tangents, 0.3, 0)
    yield "attention_bwd", WITHOUT_GRADIENT, (o, *primals, o, lse, 0.3)


def attention_qkv(device):
    qkv, qkv_dot = (torch.stack(x, 2) for x in make_inputs("iid", 2, 17, 17, 2, 24, F32, device))
    (bias,), (o, lse) = random((144,), device=device), ops.attention_qkv(qkv, None, 0.3)
    yield "attention_qkv", WITHOUT_GRADIENT, (qkv, bias, 0.3)
    yield "attention_qkv", WITH_GRADIENT, (*leaves(qkv), None, 0.3)
    yield "attention_qkv", WITH_GRADIENT, (*leaves(qkv, bias), 0.3)
    yield "attention_qkv_jvp", WITHOUT_GRADIENT, (qkv, None, qkv_dot[1:], 0.3, 1)
    yield "attention_qkv_jvp", WITH_GRADIENT, (*leaves(qkv, bias), qkv_dot, 0.3, 0)
    for dtype in (None, F16):
        yield "attention_qkv_bwd", WITHOUT_GRADIENT, (o, qkv, o, lse, 0.3, dtype)


def adamw_ema(device):
    shapes = [(3, 5), (64,)]
    p, g, m, v = ([torch.rand(s, device=device) for s in shapes] for _ in range(4))
    emas, copies = [x.clone() for _ in range(2) for x in p], [x.bfloat16() for x in p]
    steps, lr = [torch.tensor(3.0) for _ in p], torch.tensor(1e-3, dtype=torch.float64, device=device)
    rest = (lr, torch.zeros((), device=device), 0.9, 0.95, 1e-8, 0.1, [0.9, 0.99])
    yield "adamw_ema", WITHOUT_GRADIENT, (p, g, m, v, steps, emas, copies, *rest)


FOLDERS = (
    *(adaln, gate_adaln, rmsnorm, gate_rmsnorm, qk_rope, join, bias_gelu, silu, swiglu, timestep_embedding),
    *(attention, attention_qkv, adamw_ema),
)
REGISTERED = sorted(
    name.removeprefix("meanflow_kernels::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("meanflow_kernels::")
)


@functools.cache
def calls(folder, device) -> list:
    return list(folder(device))


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(kernel_route, device, name):
    if name == "adamw_ema" and device in MISSING:
        pytest.skip(f"no native library here: {MISSING[device]}")
    # the longest prefix: attention_qkv_jvp is attention_qkv's
    folder = max((f for f in FOLDERS if name.startswith(f.__name__)), key=lambda f: len(f.__name__), default=None)
    assert folder, f"{name} has no call above"
    found = [call for call in calls(folder, device) if call[0] == name]
    assert found, f"{name} has no call above"
    for _, tests, arguments in found:
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=tests)
