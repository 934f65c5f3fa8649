"""The parts of the suite: what is measured, with which arguments, in which run, and for how long at most."""

import re
import shlex
from dataclasses import dataclass, replace

from ..workloads.step_variants import VARIANTS

LIMIT = 540
"""Seconds of a part at most, unless it says less."""


@dataclass(frozen=True)
class Part:
    """A command that makes rows, or tests."""

    name: str
    device: str
    command: str
    """Arguments of Python; {rows} is the file to write, {merged} all rows so far, {out} the suite's folder, {stamp}
    the options --rows, --device, --turns and --commit, {workers} pytest's processes."""
    runs: tuple[str, ...] = ("quick", "full")
    """The runs that it is a part of."""
    limit: int = LIMIT
    """Seconds that it may run; those in which it is stopped do not count."""
    seconds: int = 60
    """Seconds that it is expected to run: beside others on an H200 with 16 cores, or on two CPU cores."""
    gib: float = 12
    """Most GPU memory that it takes, in GiB: parts run side by side only if their sum fits."""
    after: tuple[str, ...] = ()
    """Parts that must have passed before it begins."""
    tests: tuple[str, ...] = ()
    """Parts that must have passed before anything of it is timed; it compiles meanwhile."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    again: bool = False
    """True if it is made from other parts' rows: it runs last, and again in each run."""


PYTEST = "-m pytest -q -rs -p no:cacheprovider"
IMF_OPS = ("rmsnorm", "gate_rmsnorm", "qk_rope", "swiglu")
OPS = ("adaln", "gate_adaln", "bias_gelu", "silu", "linear", "timestep_embedding", *IMF_OPS)
TABLE_4 = {"b4": 256, "b2": 64, "m2": 32, "l2": 32, "xl2": 32, "xl2-plus": 32}
IMF = {"imf-b2": 32, "imf-xl2": 32}
RECIPES = {f"imagenet-{name}": batch for name, batch in TABLE_4.items()} | IMF
"""The batch on one GPU: of the paper's Table 4 a part of 256, of improved MeanFlow's smallest and largest one of 1,024
on 32 GPUs."""
TINY = "--precision fp32 --kappa 0.5 --seconds 15"
"""Options of a step on a CPU; a slow CPU takes fewer steps."""
SAMPLED = "--input-size 8 --steps 1 --network eager --decode plain channels-last bf16 --seconds 5"
"""Images of 64x64 on a CPU, where the decoder of larger ones takes seconds."""


def step(model: str, batch: int, options: str, compare: str) -> str:
    return f"-m benchmarks.step --model {model} --batch {batch} {options} --compare {compare} {{stamp}}"


def bench(*ops: str, choice: str = "") -> str:
    only = f" -k {shlex.quote(choice)}" if choice else ""
    return f"{PYTEST} --benchmark-quiet {{stamp}} {' '.join(f'benchmarks/bench_{op}.py' for op in ops)}{only}"


def accounts(recipe: str) -> str:
    return f"-m benchmarks.accounting --preset {recipe} --batch {RECIPES[recipe]} --json {{rows}}"


def recipe(name: str, compared: str = "ours-captured") -> str:
    options = f"--compare {compared} --against ours-eager"
    return f"-m benchmarks.step --preset {name} --batch {RECIPES[name]} {options} {{stamp}}"


def scaling(axis: str, variant: str, options: str) -> str:
    return f"-m benchmarks.scaling --axis {axis} --variant {variant} {options} {{stamp}}"


def breakdown(name: str, model: str, batch: int, options: str) -> str:
    trace = f"--trace {{out}}/step-{name}.trace.json"
    return f"-m benchmarks.breakdown --model {model} --batch {batch} {options} {trace} {{stamp}}"


def kernels(name: str) -> str:
    return f"-m benchmarks.breakdown --preset {name} --batch {RECIPES[name]} --captured --kernels {{rows}} {{stamp}}"


def twice(model: str, batch: int, options: str) -> str:
    return f"-m benchmarks.regression --self-check --model {model} --batch {batch} {options} {{stamp}}"


def inference(model: str, batch: int, options: str = "") -> str:
    return f"-m benchmarks.inference --model {model} --batch {batch} {options} {{stamp}}"


def tune(*ops: str) -> str:
    return f"-m benchmarks.tune {' '.join(ops)} --seconds 150 {{stamp}}"


def tests(name: str, *arguments: str, seconds: int) -> Part:
    """Tests of what is timed, as a part like others: a failure stops only the timing of what they test."""
    return Part(f"tests-{name}", "cuda", f"{PYTEST} {{workers}} {' '.join(arguments)}", seconds=seconds, gib=12)


ATTENTION = {"tests": ("tests-attention",), "needs": ("pytest_benchmark",)}
OTHERS = {"tests": ("tests-operators",), "needs": ("pytest_benchmark",)}
ATTENTION_TESTS = [
    f"tests/kernels/test_attention{what}.py"
    for what in ("", "_backends", "_backward", "_persistent", "_properties", "_qkv")
]
ELSEWHERE = [
    *(
        f"tests/meanflow/{name}.py"
        for name in (
            "training/test_step",
            "training/test_captured",
            "training/test_training",
            "model/test_copies",
            "method/test_sampling",
            "training/test_prefetch",
            "interop/test_pipeline",
        )
    ),
    "tests/benchmarks/test_inference.py",
]
"""Files with tests, marked "gpu", that need one, beside those of the operators; others may import what is not there."""
SCALING = {"batch": "--model XL/2", "tokens": "--model B/2 --batch 8", "model": "--batch 32"}
GUIDED = "--kappa 0.5 --against ours-eager"
"""Every variant is timed in a process of its own, so that they compile side by side: their gradients are compared with
the eager step's, which is quickly built."""
MODELS = {"xl2": ("XL/2", 32), "b4": ("B/4", 256)}
CPU = {"tests": ("tests",)}
ABLATION_CPU = ",".join(name for name in VARIANTS if name.startswith("ours-eager"))


def variant(name: str, compared: str, seconds: int, gib: float, options: str = GUIDED, **more) -> Part:
    """A variant of XL/2's or B/4's step."""
    size = MODELS[name.partition("-")[0]]
    return Part(name, "cuda", step(*size, options, compared), seconds=seconds, gib=gib, **more)


def improved(name: str, compared: str, seconds: int, gib: float) -> Part:
    """A variant of improved MeanFlow's step."""
    preset = next(preset for preset in IMF if name.startswith(preset))
    return Part(name, "cuda", recipe(preset, compared), seconds=seconds, gib=gib)


KERNELS = "--kappa 0.5 --captured --kernels {rows}"
CUDA_PARTS = [
    # the order is that of worth; what compiles longest must begin early
    Part("build", "cuda", "-m benchmarks.build", limit=180, seconds=15, gib=0),
    variant("xl2-captured", "ours-captured", 150, 34),
    variant("xl2-naive-compiled", "naive-compiled", 330, 34),
    tests("attention", *ATTENTION_TESTS, seconds=60),
    variant("b4-captured", "ours-captured", 100, 16),
    tests(
        "operators",
        "tests/kernels",
        "--ignore=tests/kernels/test_static_report.py",
        *(f"--ignore={path}" for path in ATTENTION_TESTS),
        seconds=130,
    ),  # fmt: skip
    tests("gpu", "-m gpu", *ELSEWHERE, seconds=90),
    variant("b4-naive-compiled", "naive-compiled", 150, 16),
    # it holds each config against fp64 itself
    Part("tune", "cuda", tune(), seconds=50),
    variant("b4-naive", "naive", 30, 26),
    variant("xl2-naive", "naive", 40, 66),
    # the plain step of 56 blocks is not compiled: that alone would last longer than a part may
    improved("imf-xl2-captured", "ours-captured", 300, 44),
    improved("imf-b2-captured", "ours-captured", 130, 16),
    improved("imf-b2-naive-compiled", "naive-compiled", 240, 46),
    improved("imf-b2-naive", "naive", 30, 46),
    improved("imf-xl2-naive", "naive", 60, 130),
    Part("kernels-xl2", "cuda", breakdown("xl2", "XL/2", 32, KERNELS), seconds=90, gib=34),
    Part("attention", "cuda", bench("attention"), seconds=80, gib=24, **ATTENTION),
    Part("pointwise", "cuda", bench(*OPS), seconds=140, gib=16, **OTHERS),
    # as the step's, its results are compared before it is timed
    Part("optimizer", "cuda", "-m benchmarks.optimizer --model XL/2 {stamp}", seconds=28, gib=60),
    Part("kernels-imf-xl2", "cuda", kernels("imf-xl2"), seconds=150, gib=44),
    Part("kernels-imf-b2", "cuda", kernels("imf-b2"), seconds=60, gib=16),
    *(
        Part(f"recipe-{name}", "cuda", recipe(f"imagenet-{name}"), seconds=90, gib=34)
        for name in ("m2", "l2", "b2", "xl2", "b4", "xl2-plus")
    ),
    # what the derivative adds: a quarter of the samples with r < t over none
    variant("xl2-unguided", "ours-captured", 90, 34, "--kappa 0 --against ours-eager"),
    variant("xl2-primal", "ours-captured", 90, 34, "--kappa 0 --share 0 --against ours-eager"),
    Part("kernels-b4", "cuda", breakdown("b4", "B/4", 256, KERNELS), seconds=45, gib=16),
    variant("xl2-ours", "ours", 120, 34),
    variant("b4-ours", "ours", 80, 16),
    *(
        variant(f"xl2-{name}", f"ours-{name}", 100, 40)
        for name in ("no-kernels", "whole-tangent", "no-primal-reuse", "whole-batch", "torch-optimizer")
    ),
    variant("xl2-eager", "ours-eager", 30, 40),
    Part(
        "same-twice-b4", "cuda", twice("B/4", 256, "--kappa 0.5 --variant ours-eager"), seconds=40, gib=30
    ),  # fmt: skip
    Part("accounting-xl2", "cuda", accounts("imagenet-xl2"), seconds=30, gib=0),
    *(Part(f"accounting-{name}", "cuda", accounts(name), seconds=30, gib=0) for name in IMF),
    Part("projection", "cuda", "-m benchmarks.projection {merged} --rows {rows}", seconds=10, again=True),
    # what --full adds
    variant("xl2-replicated", "ours-captured-replicated", 200, 40, runs=("full",)),
    *(
        variant(f"b4-{name}", f"ours-{name}", 80, 30, runs=("full",))
        for name in ("no-kernels", "whole-tangent", "no-primal-reuse", "whole-batch", "torch-optimizer", "eager")
    ),
    Part("same-twice-xl2", "cuda", twice("XL/2", 16, "--kappa 0.5"), ("full",), gib=60),
    *(
        Part(f"scaling-{axis}-{which}", "cuda", scaling(axis, which, options), ("full",), gib=130)
        for axis, options in SCALING.items()
        for which in ("ours", "naive")
    ),
    *(
        # a batch a part, because each is compiled
        Part(f"inference-{name}-{batch}", "cuda", inference(model, batch), ("full",), gib=30)
        for name, (model, _) in MODELS.items()
        for batch in (1, 64)
    ),
    *(
        Part(f"accounting-{name}", "cuda", accounts(f"imagenet-{name}"), ("full",), gib=0)
        for name in TABLE_4
        if name != "xl2"
    ),
]

CPU_PARTS = [
    Part(
        "tests",
        "cpu",
        f"{PYTEST} tests/kernels/test_attention.py tests/kernels/test_counts.py tests/meanflow/method/test_plan.py",
        limit=90,
    ),  # fmt: skip
    Part("step-s8", "cpu", step("S/8", 4, TINY, "naive,ours-eager"), limit=90, **CPU),
    Part("ablation-s8", "cpu", step("S/8", 4, TINY, ABLATION_CPU), limit=90, **CPU),
    Part("same-twice-s8", "cpu", twice("S/8", 4, f"{TINY} --variant ours-eager --repeats 21"), limit=90, **CPU),
    Part(
        "attention",
        "cpu",
        bench("attention", choice="not compiled and hd72 and not N1024"),
        limit=60,
        needs=("pytest_benchmark",),
        **CPU,
    ),  # fmt: skip
    Part(
        "pointwise",
        "cpu",
        bench("adaln", "linear", choice="not compiled"),
        limit=60,
        needs=("pytest_benchmark",),
        **CPU,
    ),  # fmt: skip
    Part("optimizer", "cpu", "-m benchmarks.optimizer --model S/8 --repeats 15 {stamp}", limit=60, **CPU),
    Part("breakdown-s8", "cpu", breakdown("s8", "S/8", 4, f"{TINY} --eager --repeats 3"), limit=60, **CPU),
    Part("scaling-s8", "cpu", scaling("batch", "ours-eager", f"--model S/8 --values 4,8,16 {TINY}"), limit=60, **CPU),
    Part("inference-s2", "cpu", inference("S/2", 1, SAMPLED), limit=90, **CPU),
    Part("accounting-b4", "cpu", accounts("imagenet-b4"), limit=60),
    Part(
        "step-digits-imf",
        "cpu",
        "-m benchmarks.step --preset digits-imf --batch 16 --precision fp32 --seconds 15 --compare naive,ours-eager "
        "{stamp}",
        limit=90,
        **CPU,
    ),  # fmt: skip
    Part("step-s4", "cpu", step("S/4", 16, TINY, "naive,naive-compiled,ours"), ("full",), **CPU),
]

PARTS = [*CUDA_PARTS, *CPU_PARTS]
"""What is measured, in the order of its worth."""


SMALL = {
    r"--preset imagenet-\S+ --batch \d+ (?=--compare)": "--model S/8 --batch 4 ",
    r"--preset imf-\S+ --batch \d+ (?=--c)": "--preset digits-imf --batch 4 ",
    r"--model \S+/\d+": "--model S/8",
    r"(?<=--model S/8 )--batch \d+": "--batch 4",
    r"--axis model": "--axis model --values S/8",
    # a rehearsal measures no recipe
    r"(?<=benchmarks.projection )\{merged\}": "benchmarks/results/h200",
}
"""Patterns of a part's options, and their replacements in a rehearsal."""


def rehearsed(part: Part) -> Part:
    """The part with a small model in the place of its own: whether it runs, not how fast."""
    command = part.command
    for pattern, small in SMALL.items():
        command = re.sub(pattern, small, command)
    return replace(part, command=command)


def chosen(device: str, *, full: bool, tests: bool = True) -> list[Part]:
    """The parts of a run; without ``tests`` nothing waits for them."""
    found = [part for part in PARTS if part.device == device and ("full" if full else "quick") in part.runs]
    if device == "cuda":
        # a library that is being written cannot be loaded
        found = [found[0], *(replace(part, after=("build",)) for part in found[1:])]
    if tests:
        return found
    return [replace(part, tests=()) for part in found if not part.name.startswith("tests")]
