"""torch.optim.AdamW whose step also keeps the moving averages and the low-precision weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .op import adamw_ema


class AdamWEMA(torch.optim.AdamW):
    """AdamW, the moving averages of its parameters and their bf16 copies, in one pass over memory (:func:`adamw_ema`).

    Hyper-parameters, ``param_groups`` and ``state_dict`` are torch.optim.AdamW's, and each loads the other's. The
    averages are weights of a network of the caller's, saved with that network. A gradient may be bf16, where its
    parameter's ``grad_dtype`` is. A parameter without one stays where it is, and its averages still move towards it.

    Args:
        params: fp32 parameters, or groups of them; DTensors are stepped on their local shards.
        lr: a number, or a scalar tensor (on the device, to change it in a captured CUDA graph).
        emas: for each decay the tensors that average the parameters, in the order of the parameters;
            for instance ``{0.9999: copy.deepcopy(net).parameters()}``.
        copies: the bf16 tensors that receive the parameters, in the same order, None for a parameter without; or none.

    Raises:
        ValueError: as adamw_ema; also for a state dict of amsgrad, of maximize or of coupled weight decay.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        emas: Mapping[float, Iterable[Tensor]] | None = None,
        copies: Iterable[Tensor | None] = (),
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.emas = {decay: self._by_parameter(f"emas[{decay}]", tensors) for decay, tensors in (emas or {}).items()}
        self.copies = self._by_parameter("copies", copies) if (copies := list(copies)) else {}
        self._complete_state()

    def _by_parameter(self, name: str, tensors: Iterable[Tensor | None]) -> dict[Tensor, Tensor]:
        params, tensors = [p for group in self.param_groups for p in group["params"]], list(tensors)
        if len(params) != len(tensors):
            raise ValueError(
                f"{name}: got {len(tensors)} tensors, wanted {len(params)}, one a parameter; "
                "pass them in the order of the parameters"
            )
        return {p: x.detach() for p, x in zip(params, tensors, strict=True) if x is not None}

    @torch.no_grad()
    def _complete_state(self) -> None:
        # from the start, for a library that finds no state takes a step to make some, which would move the averages
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                # a 0-dim tensor on the parameter's device, where a captured graph can count it up
                step = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
                state["step"] = step.to(p.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    if key not in state:
                        state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of this class or of torch.optim.AdamW."""
        for group in state_dict["param_groups"]:
            for key, wanted in (("amsgrad", False), ("maximize", False), ("decoupled_weight_decay", True)):
                if group.get(key, wanted) != wanted:
                    raise ValueError(
                        f"state_dict: got {key}={group[key]}, wanted {wanted}; save it from an AdamW without it"
                    )
        super().load_state_dict(state_dict)
        self._complete_state()

    @torch.no_grad()
    def step(self, closure=None, *, skip: Tensor | None = None):
        """One step, or none where skip, a scalar tensor, is 1; returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            self._move([p for p in moved if p in self.copies], group, skip)
            self._move([p for p in moved if p not in self.copies], group, skip)
            rest = [p for p in group["params"] if p.grad is None]
            for decay, ema in self.emas.items() if rest and not (skip is not None and bool(skip)) else ():
                torch._foreach_lerp_([ema[p] for p in rest], rest, 1 - decay)
        return loss

    def _move(self, params: list[Tensor], group: dict, skip: Tensor | None) -> None:
        """Step parameters that all have a copy, or that all have none."""
        states = [self.state[p] for p in params]
        adamw_ema(
            params,
            [p.grad for p in params],
            *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            emas={decay: [ema[p] for p in params] for decay, ema in self.emas.items()},
            copies=[self.copies[p] for p in params if p in self.copies],
            skip=skip,
        )
