"""AdamW and exponential moving averages as mathematics, in place, in the parameters' own precision."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw_ema_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    emas: Mapping[float, Sequence[Tensor]],
    copies: Sequence[Tensor],
    skip: Tensor | None = None,
) -> None:
    """One step on lists of equal length. Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2,
    with torch.optim.AdamW's place for eps; then ema <- ema + (1 - decay) (p - ema) for each decay, and copy <- p.
    Where skip is 1 everything stays as it is.
    """
    if skip is not None and bool(skip):
        return
    beta1, beta2 = betas
    grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
    torch._foreach_add_(steps, 1)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    for p, exp_avg, exp_avg_sq, step in zip(params, exp_avgs, exp_avg_sqs, steps, strict=True):
        # in double: 1 - beta^step cancels
        bias1 = 1 - beta1 ** step.double()
        bias2 = 1 - beta2 ** step.double()
        p.sub_(lr / bias1 * exp_avg / (exp_avg_sq.sqrt() / bias2.sqrt() + eps))
    for decay, ema in emas.items():
        torch._foreach_lerp_(ema, params, 1 - decay)
    if copies:
        torch._foreach_copy_(copies, params)
