"""Calls the native adamw_ema with arguments that would be unsafe: ``python adamw_ema_refusals.py cpu|cuda``.

A process of its own, for a wrong answer may end it. Prints a line of JSON a case, what the error should say and what it
says (None where there is none), then the number of those that should be refused.
"""

import json
import sys

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import meanflow_kernels.adamw_ema  # noqa: F401, loads the operator

DEVICE = sys.argv[1]


def valid() -> dict:
    """A call's arguments: two parameters, two averages."""
    like = lambda: [torch.ones(4, 6, device=DEVICE), torch.ones(5, device=DEVICE)]  # noqa: E731
    arguments = {name: like() for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments["steps"] = [torch.ones((), device=DEVICE) for _ in range(2)]
    arguments |= {"emas": like() + like(), "copies": [x.bfloat16() for x in like()]}
    arguments |= {"lr": torch.tensor(0.1, dtype=torch.float64, device=DEVICE), "skip": torch.zeros((), device=DEVICE)}
    return arguments | {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "ema_decays": [0.9, 0.5]}


def without_memory(x: Tensor, elements: int) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(elements * x.element_size())
    return x


FLOAT, FLAT = torch.ones(4, 6, device=DEVICE), torch.ones(60, device=DEVICE)
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")
GONE, TAKEN = "got a tensor whose memory was taken away", "got memory that another argument has too"

# changes of a valid call: a whole argument by name, or a tensor by (list, place)
ACCEPTED: dict[str, dict] = {
    "nothing wrong": {},
    "gradients of either dtype": {("grads", 0): FLOAT.bfloat16()},
    "what is read may be read twice": {("grads", 1): FLAT[:5], ("steps", 0): FLAT[0], ("steps", 1): FLAT[0]},
}
# by what the error says
REFUSED: dict[str, dict] = {
    "grads: got 0 tensors, wanted 2": {"grads": []},
    "steps: got 0 tensors, wanted 2": {"steps": []},
    "grads: got 2 tensors, wanted 0": {"params": []},
    "emas: got 3 tensors, wanted 4": {"emas": valid()["emas"][1:]},
    "copies: got 1 tensors, wanted 2": {"copies": valid()["copies"][1:]},
    "ema_decays: got 5, wanted at most 4": {"emas": 5 * valid()["params"], "ema_decays": [0.5] * 5},
    **{f"{x}[0]: got another dtype, wanted float32": {(x, 0): FLOAT.double()} for x in LISTS if x != "grads"},
    "grads[0]: got another dtype, wanted float32 or bfloat16": {("grads", 0): FLOAT.half()},
    "grads[0]: got shape (6, 4), wanted (4, 6)": {("grads", 0): FLAT[:24].view(6, 4).bfloat16()},
    "copies[0]: got another dtype, wanted bfloat16": {("copies", 0): FLOAT.half()},
    "steps[0]: got another dtype, wanted float32": {("steps", 0): torch.ones((), device=DEVICE, dtype=torch.int32)},
    "lr: got another dtype, wanted float64": {"lr": torch.ones((), device=DEVICE)},
    "skip: got another dtype, wanted float32": {"skip": torch.zeros((), device=DEVICE, dtype=torch.bool)},
    **{f"{name}[0]: got shape (4, 5), wanted (4, 6)": {(name, 0): FLAT[:20].view(4, 5)} for name in LISTS[1:]},
    **{f"{name}[0]: got shape (6, 4), wanted (4, 6)": {(name, 0): FLAT[:24].view(6, 4)} for name in LISTS[1:]},
    "steps[0]: got 2 elements, wanted 1": {("steps", 0): FLAT[:2]},
    "lr: got 2 elements, wanted 1": {"lr": torch.ones(2, device=DEVICE, dtype=torch.float64)},
    "skip: got 0 elements, wanted 1": {"skip": torch.zeros(0, device=DEVICE)},
    # transposed, expanded, with gaps
    **{f"{name}[0]: got a tensor that is not contiguous": {(name, 0): FLAT[:24].view(6, 4).t()} for name in LISTS[2:]},
    "grads[0]: got a tensor that is not contiguous": {("grads", 0): FLAT[:1].expand(4, 6)},
    "params[1]: got a tensor that is not contiguous": {("params", 1): FLAT[:10:2]},
    f"exp_avgs[1]: {TAKEN}": {("params", 1): FLAT[:5], ("exp_avgs", 1): FLAT[4:9]},
    f"grads[1]: {TAKEN}": {("params", 0): FLAT[:24].view(4, 6), ("grads", 1): FLAT[19:24]},
    f"steps[1]: {TAKEN}": {("exp_avg_sqs", 0): FLAT[:24].view(4, 6), ("steps", 1): FLAT[23]},
    f"emas[3]: {TAKEN}": {("grads", 0): FLAT[:24].view(4, 6), ("emas", 3): FLAT[10:15]},
    f"copies[1]: {TAKEN}": {("params", 1): FLAT[:5], ("copies", 1): FLAT[:5].view(torch.bfloat16)[5:]},
    **{f"{name}[0]: {GONE}": {(name, 0): without_memory(FLOAT, 0)} for name in LISTS},
    f"grads[1]: {GONE}": {("grads", 1): without_memory(FLAT[:5].bfloat16(), 4)},
    f"copies[0]: {GONE}": {("copies", 0): without_memory(FLOAT.bfloat16(), 23)},
    f"skip: {GONE}": {"skip": without_memory(torch.zeros((), device=DEVICE), 0)},
}
if DEVICE == "cpu":
    odd = torch.frombuffer(bytearray(64), dtype=torch.float32, offset=1, count=5)
    REFUSED["grads[1]: got an address that is no multiple of an element's size"] = {("grads", 1): odd}
else:
    away = "got a tensor on another device, wanted one on cuda:0"
    host = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, valid())
    ACCEPTED["rate and word to skip on the host"] = {"lr": host["lr"], "skip": host["skip"]}
    REFUSED |= {f"{name}[1]: {away}": {(name, 1): host[name][1]} for name in (*LISTS, "steps", "copies")}
    # one tensor on the GPU brings the call to its library
    REFUSED[f"params[0]: {away}"] = host | {"lr": valid()["lr"]}


def error_of(changes: dict) -> str | None:
    arguments = valid()
    for where, value in changes.items():
        if isinstance(where, tuple):
            name, i = where
            arguments[name][i] = value
        else:
            arguments[where] = value
    try:
        torch.ops.meanflow_kernels.adamw_ema(*arguments.values())
    except RuntimeError as error:
        return str(error)
    return None


for wanted, changes in (ACCEPTED | REFUSED).items():
    # flushed: the line that is not there is the call that ended the process
    print(json.dumps([wanted if wanted in REFUSED else None, error_of(changes)]), flush=True)
if DEVICE == "cuda":
    torch.cuda.synchronize()
print(len(REFUSED))
