"""The subjects of the tuner: each operator at the models' shapes, its shipped launch config and the candidates."""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from meanflow_kernels.adaln import candidates as adaln_candidates
from meanflow_kernels.adaln import op as adaln_op
from meanflow_kernels.attention import candidates as attention_candidates
from meanflow_kernels.attention.config import (
    BACKWARD,
    BESIDE,
    FORWARD,
    Backend,
    backward_configs,
    dual_config,
    plain_config,
    preferred,
)
from meanflow_kernels.bias_gelu import candidates as bias_gelu_candidates
from meanflow_kernels.bias_gelu import op as bias_gelu_op
from meanflow_kernels.gate_adaln import candidates as gate_adaln_candidates
from meanflow_kernels.gate_adaln import op as gate_adaln_op
from meanflow_kernels.gate_rmsnorm import candidates as gate_rmsnorm_candidates
from meanflow_kernels.gate_rmsnorm import op as gate_rmsnorm_op
from meanflow_kernels.launch import CompileCase, Launch
from meanflow_kernels.qk_rope import candidates as qk_rope_candidates
from meanflow_kernels.qk_rope import op as qk_rope_op
from meanflow_kernels.rmsnorm import candidates as rmsnorm_candidates
from meanflow_kernels.rmsnorm import op as rmsnorm_op
from meanflow_kernels.swiglu import candidates as swiglu_candidates
from meanflow_kernels.swiglu import op as swiglu_op

from ..workloads.shapes import IMF, MODELS, Shape
from . import trials
from .trials import Trial

SHAPES = MODELS | {"L/2": Shape(32, 256, 16, 64), "S/2": Shape(64, 256, 6, 64)}
"""All widths of the DiT family, and both head dims at 256 tokens."""
ATTENTION = SHAPES | IMF | {"276 tokens": Shape(32, 276, 16, 72)}
"""Attention's: also behind the tokens of improved MeanFlow's conditions, at both head dims."""


def size_for(device: str, shape: Shape) -> Shape:
    """``shape`` on a GPU; on a CPU what the interpreter does in a second."""
    return shape if device == "cuda" else Shape(batch=2, tokens=3, heads=2, head_dim=shape.head_dim)


@dataclass(frozen=True)
class Subject:
    """One kernel at one shape."""

    op: str
    model: str
    network_pass: str
    """The pass of the network that launches it: mixed (primal and tangent), guidance or backward."""
    shape: Shape
    half: torch.dtype
    table: str
    """The table that a better config belongs in."""
    shipped: object
    same: dict[object, object]
    """Maps each config (shipped or candidate) to the first that makes the same launches at this shape."""
    build: Callable[[str], Trial]
    """Makes the trial on a device; "meta" for compiling only."""

    @property
    def configs(self) -> tuple:
        """The configs with different launches, the shipped one first."""
        return tuple(config for config, first in self.same.items() if config == first)

    @property
    def title(self) -> str:
        return f"{self.op} {self.model} {self.network_pass} {self.shape}"

    def compiles(self, config: object) -> bool:
        """True if the config is of our kernels, False if it names a library."""
        return config is Backend.TRITON or not isinstance(config, enum.Enum)

    def entry(self, config: object) -> str:
        """The config as its table would spell it."""
        if isinstance(config, enum.Enum):
            return str(config)
        if isinstance(config, tuple):
            return f"({', '.join(map(self.entry, config))})"
        given = (f for f in dataclasses.fields(config) if getattr(config, f.name) != f.default)
        return f"{type(config).__name__}({', '.join(f'{f.name}={getattr(config, f.name)!r}' for f in given)})"

    def label(self, config: object) -> str:
        """The config in words: its own label, else the fields in which it differs from the shipped one."""
        if isinstance(config, enum.Enum):
            return config.value
        if isinstance(config, tuple):
            return ", ".join(map(str, config))
        if type(config).__str__ is not object.__str__:
            return str(config)
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        other = {k: v for k, v in fields.items() if v != getattr(self.shipped, k)} or fields
        return " ".join(f"{name}={value}" for name, value in other.items())


def _signature(launches: Iterable[Launch]) -> tuple:
    """A key that is equal for equal launches on the same tensors."""
    return tuple(
        (x.kernel, x.grid, *x.options.items(), *x.constexprs.items())
        + tuple(value for value in x.args.values() if not isinstance(value, torch.Tensor))
        for x in launches
    )


def _subject(
    op: str, model: str, network_pass: str, shape: Shape, half: torch.dtype, table, shipped, candidates, build
):
    build = functools.partial(build, shape, half)
    trial, same, first = build("meta"), {}, {}
    for config in (shipped, *candidates):
        library = isinstance(config, enum.Enum) and config is not Backend.TRITON
        key = config if library else _signature(trial.launches(config))
        same[config] = first.setdefault(key, config)
    return Subject(op, model, network_pass, shape, half, table, shipped, same, build)


def _attention_subjects(model: str, arch: int, half: torch.dtype, device: str) -> Iterable[Subject]:
    base, d = ATTENTION[model], ATTENTION[model].head_dim
    some = base.batch // 4
    length = size_for(device, base).tokens
    dual, single = (choose(arch, half, d, length) for choose in (dual_config, plain_config))
    triton = backward_configs(arch, half, d, length)
    forward = functools.partial(trials.attention, shipped=single)
    beside = functools.partial(forward, beside=True)
    both = functools.partial(trials.attention, shipped=dual, dual=True)
    backward = functools.partial(trials.attention_bwd, shipped=triton)
    duals = attention_candidates.dual_candidates(arch, half, d)
    singles = attention_candidates.plain_candidates(arch, d)
    pairs = attention_candidates.backward_candidates(arch)

    def library(table):
        first = (*preferred(table, arch, d, length), Backend.TRITON)[0]
        return first, tuple(Backend)

    for op, network_pass, batch, table, (shipped, candidates), build in (
        ("attention_jvp", "mixed", some, "dual", (dual, duals), both),
        ("attention", "guidance", base.batch + some, "plain", (single, singles), forward),
        ("attention", "mixed", base.batch - some, "plain", (single, singles), forward),
        ("attention library", "guidance", base.batch + some, "FORWARD", library(FORWARD), forward),
        ("attention library", "mixed", base.batch - some, "BESIDE", library(BESIDE), beside),
        ("attention_bwd library", "backward", base.batch, "BACKWARD", library(BACKWARD), backward),
        ("attention_bwd", "backward", base.batch, "backward", (triton, pairs), backward),
    ):
        shape = size_for(device, replace(base, batch=batch))
        place = f"attention/config.py, {table}, head dim {d}, {length} tokens"
        yield _subject(op, model, network_pass, shape, half, place, shipped, candidates, build)


ROWS = {
    "gate_adaln": (gate_adaln_op, trials.gate_adaln, trials.gate_adaln_bwd, gate_adaln_candidates),
    "adaln": (adaln_op, trials.adaln, trials.adaln_bwd, adaln_candidates),
    "bias_gelu": (bias_gelu_op, trials.bias_gelu, trials.bias_gelu_bwd, bias_gelu_candidates),
}
IMF_ROWS = {
    "gate_rmsnorm": (gate_rmsnorm_op, trials.gate_rmsnorm, trials.gate_rmsnorm_bwd, gate_rmsnorm_candidates),
    "qk_rope": (qk_rope_op, trials.qk_rope, trials.qk_rope_bwd, qk_rope_candidates),
    "rmsnorm": (rmsnorm_op, trials.rmsnorm, trials.rmsnorm_bwd, rmsnorm_candidates),
    "swiglu": (swiglu_op, trials.swiglu, trials.swiglu_bwd, swiglu_candidates),
}
"""The operators of improved MeanFlow's transformer alone."""


def _row_subjects(op: str, model: str, half: torch.dtype, device: str) -> Iterable[Subject]:
    module, forward, backward, candidates = (ROWS | IMF_ROWS)[op]
    base = (SHAPES | IMF)[model]
    shape, more = size_for(device, base), size_for(device, replace(base, batch=base.batch + base.batch // 4))
    single, dual = functools.partial(forward, n=0), functools.partial(forward, n=max(1, shape.batch // 4))
    sums = functools.partial(trials.sums, backward=backward, config=module.BACKWARD)
    for name, network_pass, size, table, build in (
        (f"{op}_jvp", "mixed", shape, "FORWARD", dual),
        (op, "guidance", more, "PRIMAL" if hasattr(module, "PRIMAL") else "FORWARD", single),
        (f"{op}_bwd", "backward", shape, "BACKWARD", backward),
        (f"{op}_bwd sums", "backward", shape, "SUMS", sums),
    ):
        # adaln runs twice a step, and has no candidates for its sums; swiglu has no sums
        if found := getattr(candidates, f"{table}_CANDIDATES", ()):
            place = f"{op}/config.py, {table}"
            yield _subject(name, model, network_pass, size, half, place, getattr(module, table), found, build)


ORDER = (
    *("attention_jvp", "attention", "attention library", "attention_bwd library"),
    *("gate_adaln_jvp", "gate_adaln", "gate_adaln_bwd", "bias_gelu_bwd", "gate_adaln_bwd sums", "bias_gelu_bwd sums"),
)
"""Operators by what a step may gain from them; all others come when these are through, Triton's backward last."""
LAST = ("S/2", "276 tokens")
"""Shapes of no model that is trained on a GPU: they come with those others."""


def subjects(arch: int, device: str) -> list[Subject]:
    """All subjects for an architecture, the most valuable first; tiny ones on a CPU."""
    # the interpreter's bf16 is wrong
    half = torch.bfloat16 if device == "cuda" else torch.float16
    models, imf, every = (list(shapes) if device == "cuda" else list(shapes)[:1] for shapes in (SHAPES, IMF, ATTENTION))
    found = []
    for model in every:
        found += _attention_subjects(model, arch, half, device)
    for names, ops in ((models, ROWS), (imf, IMF_ROWS)):
        for model, op in itertools.product(names, ops):
            found += _row_subjects(op, model, half, device)

    def rank(subject: Subject) -> tuple[int, ...]:
        first = subject.op in ORDER and subject.model not in LAST
        order = (*ORDER, subject.op).index(subject.op)
        return not first, subject.op == "attention_bwd", list(ATTENTION).index(subject.model), order

    return sorted(found, key=rank)


def compile_cases(arch: int) -> list[tuple[str, int, CompileCase]]:
    """(folder, architecture, case) of every kernel that the subjects' configs launch, once each, as the static report
    compiles them."""
    found = {}
    for subject in subjects(arch, "cuda"):
        folder, trial = subject.table.partition("/")[0], subject.build("meta")
        size = subject.shape.head_dim if folder == "attention" else subject.shape.width
        for config in filter(subject.compiles, subject.configs):
            for launch in trial.launches(config):
                case = CompileCase(subject.op, repr(config), subject.half, size, launch)
                key = case.source().hash(), *launch.options.items()
                found.setdefault(key, (folder, arch, case))
    return list(found.values())
