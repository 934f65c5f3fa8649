"""What bf16 does to u and du/dt: against fp64, beside the same network under autocast and torch.func.jvp."""

import pytest
import torch
from torch import nn

from benchmarks.harness.errors import relative_error
from benchmarks.workloads.naive import NaiveDiT
from meanflow.config import ModelConfig
from meanflow.method.passes import pair_jvp
from meanflow.model.build import build_net

WIDTHS = {"S": (384, 6), "XL": pytest.param(1152, 16, marks=pytest.mark.slow)}
DEPTH, BATCH = 4, 4


def network_and_inputs(width: int, heads: int):
    config = ModelConfig(depth=DEPTH, hidden_size=width, num_heads=heads, patch_size=4, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    net = build_net(config)
    net.init_weights(generator)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():  # adaLN-Zero starts as the identity
            nn.init.normal_(p, std=0.02, generator=generator)
    z, v = torch.randn(2, BATCH, 4, 32, 32, generator=generator)
    r, t = torch.rand(2, BATCH, generator=generator).sort(0).values
    return config, net, (z, r, t), (v, None, torch.ones_like(t)), torch.arange(BATCH)


@pytest.mark.parametrize("width, heads", WIDTHS.values(), ids=WIDTHS)
def test_bf16_derivative_is_as_exact_as_naive_forward_mode(width, heads):
    config, net, primals, direction, y = network_and_inputs(width, heads)
    weights = net.state_dict()
    naive = NaiveDiT(config, torch.bfloat16)
    naive.load_state_dict(weights)
    ours = build_net(config, torch.bfloat16)
    ours.load_state_dict(weights)
    with torch.no_grad():
        pairs = zip(primals, direction, strict=True)
        tangents = tuple(torch.zeros_like(x) if x_dot is None else x_dot for x, x_dot in pairs)
        got = pair_jvp(ours, primals, direction, (y,))
        beside = torch.func.jvp(lambda z, r, t: naive(z, r, t, y), primals, tangents)
        doubled = [tuple(None if x is None else x.double() for x in xs) for xs in (primals, direction)]
        exact = pair_jvp(net.double(), *doubled, (y,))
    for name, x, x_naive, x_exact in zip(("u", "du/dt"), got, beside, exact, strict=True):
        error, bar = relative_error(x, x_exact), 2 * relative_error(x_naive, x_exact)
        assert 0 < error <= bar < 0.1, f"{name}: error {error:.2e}, naive's {bar / 2:.2e}"
        assert x.dtype == torch.float32  # output, target and loss keep it
