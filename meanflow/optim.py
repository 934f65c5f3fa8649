"""The optimizer and the moving average of the weights."""

import torch
from torch import Tensor, nn

from .config import OptimConfig


def make_optimizer(config: OptimConfig, net: nn.Module) -> torch.optim.AdamW:
    """Adam with decoupled weight decay, as the official code calls it."""
    return torch.optim.AdamW(
        net.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of a step, counted from 0: constant after a linear warm-up."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr


@torch.no_grad()
def update_ema(ema: list[Tensor], params: list[Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) params, in place, after the optimizer's step; it starts as the weights."""
    torch._foreach_mul_(ema, decay)
    torch._foreach_add_(ema, params, alpha=1 - decay)
