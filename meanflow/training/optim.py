"""The optimizer, whose step also moves the average of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meanflow_kernels.adamw_ema import AdamWEMA

from ..config import OptimConfig
from ..errors import UserError
from ..model.copies import keep_products

APEX = (
    "optim.implementation: got apex, whose FusedAdam cannot be used here ({}), wanted NVIDIA's apex and a GPU; "
    "install it from github.com/NVIDIA/apex (PyPI's apex is another package), or take native or torch"
)


def make_optimizer(
    config: OptimConfig,
    net: nn.Module,
    ema: nn.Module | None = None,
    *,
    copies: bool = False,
    products: bool = False,
    captured: bool = False,
) -> torch.optim.Optimizer:
    """Make Adam, or RAdam, with decoupled weight decay; its step() updates the moving average too.

    Args:
        config: says which implementation; all compute the same.
        net: fp32 parameters, or shards of them (FSDP2).
        ema: a network of the same parameters that follows net's, ema <- decay ema + (1 - decay) net.
        copies: keep the network's low-precision weights too (`Transformer.make_copies`), if the implementation can.
        products: gradients are never summed over processes or micro-batches: those of weights with a copy stay in its
            dtype (`keep_products`).
        captured: the step will be captured in a CUDA graph: the learning rate is a tensor on the device.

    Raises:
        UserError: for apex if NVIDIA's apex is not installed.
    """
    params = list(net.parameters())
    averages = [] if ema is None else list(ema.parameters())
    kept = net.make_copies() if copies and config.implementation == "native" else []
    if kept and products:
        keep_products(params, kept)
    return optimizer_of(config, params, averages, kept, captured=captured)


def optimizer_of(
    config: OptimConfig,
    params: list[Tensor],
    averages: list[Tensor],
    copies: Sequence[Tensor | None] = (),
    *,
    captured: bool = False,
) -> torch.optim.Optimizer:
    """Make the same of tensors.

    Args:
        averages: what follows the parameters, or none. copies: what the native one writes in low precision, or none.

    Raises:
        UserError: for apex if NVIDIA's apex is not installed.
    """
    betas = (config.beta1, config.beta2)
    options: dict[str, Any] = dict(lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    if captured:
        options["lr"] = torch.tensor(config.lr, device=params[0].device)
    if config.implementation == "native":
        emas = {config.ema_decay: averages} if averages else None
        return AdamWEMA(params, **options, emas=emas, copies=copies)
    if config.algorithm == "radam":
        optimizer = torch.optim.RAdam(params, **options, decoupled_weight_decay=True, capturable=captured)
    elif config.implementation == "apex":
        optimizer = _apex(params, options, captured)
    else:
        optimizer = torch.optim.AdamW(params, **options, fused=True, capturable=captured)
    if averages:
        optimizer.register_step_post_hook(lambda *_: update_ema(averages, params, config.ema_decay))
    return optimizer


def _apex(params: list[Tensor], options: dict, captured: bool) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam

        return FusedAdam(params, **options, adam_w_mode=True, capturable=captured)
    except (ImportError, RuntimeError) as error:
        raise UserError(APEX.format(error)) from None


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Step, or change nothing if skip, a scalar tensor, is 1. The host waits unless the optimizer is native."""
    if isinstance(optimizer, AdamWEMA):
        optimizer.step(skip=skip)
    elif not skip:
        optimizer.step()


def learning_rate(config: OptimConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: constant after a linear warm-up."""
    if step < config.warmup_steps:
        return config.lr * (step + (not config.warmup_from_zero)) / config.warmup_steps
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; in place if it is a tensor, which a captured graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of a whole gradient (), in fp32; gradients in bf16 are read as they are."""
    low = [i for i, grad in enumerate(grads) if grad.dtype == torch.bfloat16]
    if not low:
        return nn.utils.get_total_norm(grads)
    high = [i for i, grad in enumerate(grads) if grad.dtype != torch.bfloat16]
    norms = {}
    # for a list of mixed dtypes torch launches a kernel per tensor
    for group in filter(None, (low, high)):
        norms |= zip(group, torch._foreach_norm([grads[i] for i in group], 2, torch.float32), strict=True)
    # in the gradients' order, so that the sum rounds as for one dtype
    return torch.linalg.vector_norm(torch.stack([norms[i] for i in range(len(grads))]))


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Update the average in place, ema <- decay ema + (1 - decay) params; call it after the optimizer's step."""
    torch._foreach_lerp_(list(ema), list(params), 1 - decay)


MOMENTS = ("exp_avg", "exp_avg_sq")


def state_tensors(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name, the same for every implementation: steps taken and moments of each parameter.

    Moments are sharded as net's parameters, of which the optimizer may step the local shards.
    """
    group, tensors = optimizer.param_groups[0], {}
    for (name, p), stepped in zip(net.named_parameters(), group["params"], strict=True):
        state = optimizer.state[stepped]
        step = state["step"] if _counts_by_parameter(optimizer) else group["step"]
        tensors[f"step.{name}"] = torch.as_tensor(step, dtype=torch.float32).reshape(())
        for key in MOMENTS:
            x = state[key]
            if isinstance(p, DTensor) and not isinstance(x, DTensor):
                x = DTensor.from_local(x, p.device_mesh, p.placements, run_check=False)
            tensors[f"{key}.{name}"] = x
    return tensors


def empty_state_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Zeros of the names, shapes and shards of :func:`state_tensors`, to load into."""
    tensors = {}
    for name, p in net.named_parameters():
        tensors[f"step.{name}"] = torch.zeros(())
        tensors |= {f"{key}.{name}": torch.zeros_like(p, requires_grad=False) for key in MOMENTS}
    return tensors


def load_state_tensors(optimizer: torch.optim.Optimizer, net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Continue from :func:`state_tensors`, of any implementation.

    Raises:
        KeyError: for a parameter whose state is missing.
    """
    group = optimizer.param_groups[0]
    for (name, p), stepped in zip(net.named_parameters(), group["params"], strict=True):
        step = tensors[f"step.{name}"]
        state = {key: tensors[f"{key}.{name}"].to(p.device) for key in MOMENTS}
        if not isinstance(stepped, DTensor):
            state = {key: x.to_local() if isinstance(x, DTensor) else x for key, x in state.items()}
        if _counts_by_parameter(optimizer):
            state["step"] = step.to(p.device)
        else:
            group["step"] = step.to(p.device, torch.int32).reshape(1) if optimizer.capturable else int(step)
        held = optimizer.state[stepped]
        for key, x in state.items():
            # in place: a captured step reads it where it is
            held[key] = held[key].copy_(x) if key in held else x


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    # apex counts the steps of a group's parameters together
    return isinstance(optimizer, (torch.optim.AdamW, torch.optim.RAdam))
