"""What the tests of all objectives share: a real DiT in fp64, a batch, gradients, FLOPs of a step."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig
from meanflow.method.contract import Objective, ObjectiveLoss, Sizes
from meanflow.model.build import build_net
from meanflow.model.dit import DiT
from meanflow.training.flops import sample_flops
from meanflow_kernels.routing import Route, force_route

F64 = torch.float64
flops_of = functools.cache(sample_flops)


def network(seed: int = 0, **options) -> DiT:
    """A small DiT whose outputs depend on all inputs."""
    torch.manual_seed(seed)
    sizes = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    net = DiT(**sizes | options).double()
    for p in net.parameters():  # adaLN-Zero starts as the identity: nothing would depend on anything
        nn.init.normal_(p, std=0.2)
    return net


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, e and y for that network."""
    g = torch.Generator().manual_seed(1)
    x, e = (torch.randn(size, 2, 4, 4, generator=g, dtype=F64) for _ in range(2))
    return x, e, torch.arange(size) % 3


def in_f64(drawn: Any) -> Any:
    """Times in fp64."""
    return pytree.tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, drawn)


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    """All gradients as one vector."""
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def assert_near(got: Tensor, wanted: Tensor, bar: float = 1e-10) -> None:
    """Within the bar, relative to the largest entry."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=bar * max(wanted.abs().max().item(), 1e-300))


def forwards(objective: Objective, model: ModelConfig, sizes: Sizes) -> float:
    """What a step of these sizes costs, in forward passes of the batch, as the log counts it."""
    flops = flops_of(model)
    return flops.of_passes(objective.passes(sizes)) / (flops.forward * objective.batch)


def counted_forwards(objective: Objective, model: ModelConfig, sizes: Sizes) -> float:
    """The same by torch's counter on the step itself, its backward included, on meta tensors."""
    with torch.device("meta"):
        net = build_net(model)
        average = build_net(model) if objective.takes_average else None
        x, e = torch.empty(2, objective.batch, model.in_channels, model.input_size, model.input_size)
        y = torch.empty(objective.batch, dtype=torch.long)
    drawn, plan = (
        pytree.tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, given)
        for given in (objective.drawn(0, 0, 0), objective.example(sizes))
    )
    with force_route(Route.TRITON), FlopCounterMode(display=False) as counter:
        ObjectiveLoss(objective, net, average)(x, e, y, drawn, plan).loss.backward()
    return counter.get_total_flops() / (flops_of(model).forward * objective.batch)
