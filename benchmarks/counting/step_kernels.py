"""The kernels of a profiled step: of what kind each is, and what those of our operators are worth.

A kernel that serves one of our operators says what that operator is worth (``operator``): ``flops`` and ``bytes`` of
its ``calls`` in a step, over ``operator_ms``, the time of all kernels that serve it, as a share of what a large product
or copy reached in the same run. FLOPs and bytes are the fewest that are needed (meanflow_kernels.counts). The second
stage of the backward kernels' sums has its own bytes, partial sums read and sums written; the first stage's partial
sums count for nobody. Calls are counted on the step's own code over meta tensors, for the plans of the profiled steps,
so that they are the same however the step runs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from meanflow.config import RunConfig
from meanflow.method.contract import Plan
from meanflow_kernels.adaln import op as adaln
from meanflow_kernels.adamw_ema import adamw_ema_bytes
from meanflow_kernels.attention.config import backward_configs
from meanflow_kernels.attention.launches import backward_launches
from meanflow_kernels.bias_gelu import op as bias_gelu
from meanflow_kernels.counts import moved_bytes
from meanflow_kernels.gate_adaln import op as gate_adaln
from meanflow_kernels.gate_rmsnorm import op as gate_rmsnorm
from meanflow_kernels.qk_rope import op as qk_rope
from meanflow_kernels.rmsnorm import op as rmsnorm

from ..harness.clock import Ceilings
from ..harness.rows import rate
from .accounts import MetaStep

OTHER = "pointwise"
INDUCTOR = r"triton_(poi|red|per)_"
KINDS = {  # a kernel's or operator's name tells its kind; the first that matches
    # in plain torch only attention has batched products and softmax; its scaling and row sums stay pointwise.
    # Inductor's are named for all operators in them and beside them
    "attention": rf"^(?!{INDUCTOR}).*(attention|flash|fmha|sdpa|dot_do_o)|aten::bmm|softmax|logsumexp",
    # casts ("_to_copy") and products too
    OTHER: f"^{INDUCTOR}",
    "GEMM": r"gemm|gemv|cutlass|cublas|nvjet|xmma|triton_tem|aten::(add)?mm|mkl_linear|mkldnn|packed_linear",
    # with the gradient's norm
    "optimizer": r"adam|lerp|multi_tensor|_foreach|lpnorm|NormTwoOps|vector_norm",
    "memory": r"memcpy|memset|copy",
    "compiled, not told apart": r"compiled",
}
PYTHON = "Python"
TRANSFERS = ("memset", "memcpy")

POINTWISE = ("adaln", "gate_adaln", "bias_gelu", "rmsnorm", "gate_rmsnorm", "qk_rope", "swiglu", "timestep_embedding")
OPERATORS = {  # by the name of a share: the kernels or operators that serve it; the first that matches
    # ours, and those of each library that may serve it
    "attention_bwd": (
        r"^attention_bwd_|flash_bwd|FlashAttnBwd|sdpa\w*_bprop|cutlassB|dot_do_o|convert_dq",
        ("attention_bwd", "attention_qkv_bwd"),
    ),
    "attention": (
        r"^attention_(\w+_)?kernel|flash_fwd|FlashAttnFwd|sdpa\w*_fprop|cutlassF",
        ("attention", "attention_jvp", "attention_qkv", "attention_qkv_jvp"),
    ),
    "sum_partials": (r"^_sum_partials_", ("sum_partials",)),
    # its backward is the same kernel
    "silu": (r"^_silu_", ("silu", "silu_jvp", "silu_bwd")),
    **{f"{op}_bwd": (rf"^_{op}_bwd_", (f"{op}_bwd",)) for op in POINTWISE},
    **{op: (rf"^_{op}_", (op, f"{op}_jvp")) for op in POINTWISE},
    "adamw_ema": (r"adamw_ema", ("adamw_ema",)),
}  # fmt: skip


def _attention_qkv_bwd(args, out) -> list:
    do, qkv, o, lse, scale, bias_dtype = args
    (q, k, v), dbias = qkv.unbind(2), None if bias_dtype is None else out[1]
    # meta tensors have no architecture: sm_90's, as they have an H200's multiprocessors
    configs = backward_configs(90, q.dtype, q.shape[-1], q.shape[1])
    return list(backward_launches(do, (q, k, v, o, lse), lse, out[0].unbind(2), scale, configs, dbias))[1:]


SECOND_STAGES: dict[str, Callable] = {
    "attention_qkv_bwd": _attention_qkv_bwd,
    "adaln_bwd": lambda args, out: adaln.backward_launches(*args[:3], *out, args[3]),
    "gate_adaln_bwd": lambda args, out: gate_adaln.backward_launches(
        *args[:7], *out[:2], [*out[3:5], out[2]], out[5], args[7]
    ),
    "bias_gelu_bwd": lambda args, out: bias_gelu.backward_launches(*args, *out),
    "gate_rmsnorm_bwd": lambda args, out: gate_rmsnorm.backward_launches(*args[:6], *out[:2], out[2:], args[6]),
    "qk_rope_bwd": lambda args, out: qk_rope.backward_launches(args[0], args[1:5], args[5:7], out[0], out[1:], args[7]),
    "rmsnorm_bwd": lambda args, out: rmsnorm.backward_launches(*args[:3], *out, args[3]),
}
"""Builds the launches of a backward call from its arguments and results: any second adds up the first's sums."""


class Activity(NamedTuple):
    """The total of one name in a profile."""

    name: str
    what: str
    """kernel, memset or memcpy; on a CPU operator or Python."""
    kind: str
    ms: float
    count: int


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def activities(events: Iterable, device: str) -> list[Activity]:
    """Read a profile's averaged events: kernels, memsets and copies on a GPU; operators and Python on a CPU."""
    found = []
    for event in events:
        name = event.key
        if device == "cuda":
            # an operator's event repeats its kernels' time, a named range that of all within
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                what = next((each for each in TRANSFERS if name.lower().startswith(each)), "kernel")
                found.append(Activity(name, what, kind_of(name), event.self_device_time_total / 1e3, event.count))
        else:
            # what a named range has of its own is between the operators
            what, kind = (PYTHON, PYTHON) if event.is_user_annotation else ("operator", kind_of(name))
            found.append(Activity(name, what, kind, event.self_cpu_time_total / 1e3, event.count))
    return found


# --- the work of our operators ---


@dataclass(frozen=True)
class Counted:
    """Calls of an operator and what they have to do; fractions in a mean."""

    calls: float = 0
    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes)

    def of(self, times: int, steps: int) -> "Counted":
        """The contribution of ``times`` out of ``steps`` steps to their mean."""
        return Counted(*(value * times / steps for value in (self.calls, self.flops, self.bytes)))


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of our operators within it, by name; their tensors are on the meta device."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, Counted] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "meanflow_kernels":
            name = func.name().partition("::")[2]
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self._add(name, Counted(1, flops, moved_bytes(args, pytree.tree_leaves(out))))
            if name in SECOND_STAGES:
                for second in list(SECOND_STAGES[name](args, out))[1:]:
                    self._add("sum_partials", Counted(1, 0, moved_bytes(second.args.values(), ())))
        return out

    def _add(self, name: str, counted: Counted) -> None:
        self.found[name] = self.found.get(name, Counted()) + counted


def count_calls(run: RunConfig, plans: list[Plan]) -> dict[str, Counted]:
    """The calls of our operators in a step and their work, by operator: the mean over steps of these plans."""
    step, total = MetaStep(run), {}
    # work depends on a plan's sizes alone
    for sizes, times in Counter(plan.sizes for plan in plans).items():
        with OperatorCalls() as calls:
            step.loss(step.objective.example(sizes)).backward()
        for name, counted in calls.found.items():
            total[name] = total.get(name, Counted()) + counted.of(times, len(plans))
    copied = [copy is not None for copy in step.net.make_copies()]
    sizes = [p.numel() for p in step.net.parameters()]
    moved = sum(adamw_ema_bytes(n, emas=1, copies=copy, bf16_grads=copy) for n, copy in zip(sizes, copied, strict=True))
    # one call for the parameters with a copy, one for those without
    return total | {"adamw_ema": Counted(len(set(copied)), 0, moved)}


def operator_of(name: str) -> str | None:
    """The name in OPERATORS of the operator that a kernel serves; None for other kernels."""
    return next((operator for operator, (kernels, _) in OPERATORS.items() if re.search(kernels, name)), None)


def worth(work: Counted, ms: float, ceilings: Ceilings) -> dict:
    """The columns that say what an operator's ``work`` in ``ms`` is of the ceiling that bounds it."""
    columns = {"calls": work.calls, "flops": work.flops, "bytes": work.bytes, "operator_ms": ms}
    columns |= {"bound": "gemm" if work.flops else "copy"}
    ceiling = ceilings.gemm_tflops if work.flops else ceilings.copy_gbps
    return columns | {"ceiling": ceiling, "share_of_ceiling": rate(columns | {"ms": ms})[0] / ceiling}


def kernel_rows(
    found: list[Activity], counted: dict[str, Counted], ceilings: Ceilings, wall_ms: float, steps: int
) -> list[dict]:
    """A row of a step for each activity of so many ``steps``, the longest first.

    Args:
        counted: the work of a step, by operator. wall_ms: of a step.
    """
    served = {each.name: operator for each in found if (operator := operator_of(each.name))}
    operator_ms = Counter()
    for each in found:
        if each.name in served:
            operator_ms[served[each.name]] += each.ms / steps
    rows = []
    for each in sorted(found, key=lambda each: -each.ms):
        row = {
            "kind": "step-kernel", "kernel": each.name, "activity": each.what, "kernel_kind": each.kind,
            "ms": each.ms / steps, "launches": each.count / steps, "us": 1e3 * each.ms / each.count, "wall_ms": wall_ms,
        }  # fmt: skip
        if operator := served.get(each.name):
            work = sum((counted.get(name, Counted()) for name in OPERATORS[operator][1]), Counted())
            if work.calls and operator_ms[operator]:
                row |= {"operator": operator} | worth(work, operator_ms[operator], ceilings)
        rows.append(row)
    return rows
