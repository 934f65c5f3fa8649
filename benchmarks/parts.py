"""The parts of the suite: what is measured, with which arguments, in which run, and for how long at most."""

import shlex
from dataclasses import dataclass

from .variants import VARIANTS

LIMIT = 540
"""Seconds of a part at most, unless it says less."""


@dataclass(frozen=True)
class Part:
    """A command that makes rows."""

    name: str
    device: str
    command: str
    """Arguments of Python; {rows} is the file to write, {merged} all rows so far, {out} the suite's folder, {stamp}
    the options --rows, --device and --commit, {workers} pytest's processes."""
    runs: tuple[str, ...] = ("quick", "full")
    """The runs that it is a part of."""
    limit: int = LIMIT
    """Seconds; a quick run adds what the parts before it left of theirs."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    again: bool = False
    """Made from other parts' rows, and made again in each run."""


PYTEST = "-m pytest -q -rs -p no:cacheprovider"
OPS = ("adaln", "gate_adaln", "bias_gelu", "silu", "linear", "timestep_embedding")
RECIPES = {"b4": 256, "b2": 64, "m2": 32, "l2": 32, "xl2": 32, "xl2-plus": 32}
"""The paper's Table 4: the batch on one GPU, a part of 256."""
TINY = "--precision fp32 --kappa 0.5 --seconds 15"
"""On a CPU; a slow one takes fewer steps."""
SAMPLED = "--input-size 8 --steps 1 --network eager --decode plain channels-last bf16 --seconds 5"
"""Images of 64x64 on a CPU, where the decoder of larger ones takes seconds."""
ABLATED = {"b4": ("B/4", 256), "xl2": ("XL/2", 32)}
EAGER = "not compiled and not reference and not N1024 and not hd64"
"""Benches that need no compiler but Triton's, at one size of attention."""


def step(model: str, batch: int, options: str, compare: str) -> str:
    return f"-m benchmarks.step --model {model} --batch {batch} {options} --compare {compare} {{stamp}}"


def bench(*ops: str, choice: str = "") -> str:
    only = f" -k {shlex.quote(choice)}" if choice else ""
    return f"{PYTEST} --benchmark-quiet {{stamp}} {' '.join(f'benchmarks/bench_{op}.py' for op in ops)}{only}"


def accounts(recipe: str) -> str:
    return f"-m benchmarks.accounting --preset imagenet-{recipe} --batch {RECIPES[recipe]} --json {{rows}}"


def recipe(name: str) -> str:
    return f"-m benchmarks.step --preset imagenet-{name} --batch {RECIPES[name]} --compare {COMPARED} {{stamp}}"


def scaling(axis: str, variant: str, options: str) -> str:
    return f"-m benchmarks.scaling --axis {axis} --variant {variant} {options} {{stamp}}"


def breakdown(name: str, model: str, batch: int, options: str) -> str:
    trace = f"{{out}}/step-{name}.trace.json"
    return f"-m benchmarks.breakdown --model {model} --batch {batch} {options} --trace {trace} {{stamp}}"


def twice(model: str, batch: int, options: str) -> str:
    return f"-m benchmarks.regression --self-check --model {model} --batch {batch} {options} {{stamp}}"


def inference(model: str, batch: int, options: str = "") -> str:
    return f"-m benchmarks.inference --model {model} --batch {batch} {options} {{stamp}}"


GATE = (
    "test_kernel_on_the_gpu and (768 or 1152 or 3072 or 4608 or timestep) and not bfloat16"
    " or test_error_in_bf16 and imagenet and not ieee or test_tangent_error_in_bf16"
    " or FLASH-64-bf16 or FLASH-72-bf16 or as_exact or official or same_bits"
)
"""Of the kernels' tests on a GPU, those at the sizes and dtypes that a quick run times: about 30, of two to five
kernels a test and a second or two a kernel to compile, in one process."""


def gate(device: str, *, full: bool) -> Part:
    """What has to pass before anything is timed."""
    if device == "cpu":
        files = "tests/kernels/test_attention.py tests/kernels/test_counts.py tests/meanflow/test_plan.py"
        return Part("tests", device, f"{PYTEST} {files}", limit=90)
    only = "" if full else f" -m gpu -k {shlex.quote(GATE)}"
    # several processes, because compiling the kernels takes longer than running them
    command = f"{PYTEST} {{workers}} --ignore=tests/kernels/test_static_report.py tests/kernels{only}"
    return Part("tests", device, command, limit=LIMIT if full else 110)


SCALING = {"batch": "--model XL/2", "tokens": "--model B/2 --batch 8", "model": "--batch 32"}
KERNELS = {"needs": ("pytest_benchmark",)}
COMPARED = "naive,naive-compiled,ours,ours-captured"
ABLATION = [
    # a few a part, because each is compiled
    ("ours-no-kernels", "ours-eager"),
    ("ours-whole-tangent", "ours-no-primal-reuse"),
    ("ours-whole-batch", "ours-torch-optimizer"),
]
ABLATION_CPU = ",".join(name for name in VARIANTS if name.startswith("ours-eager"))

PARTS = [
    # the quick run on a GPU, whose limits and those of its tests are the 8 minutes; --full measures the same and more
    Part("step-b4", "cuda", step("B/4", 256, "--kappa 0.5", "naive,ours"), ("quick",), 75),
    Part("step-xl2", "cuda", step("XL/2", 32, "--kappa 0.5", "naive,ours"), ("quick",), 150),
    Part("attention", "cuda", bench("attention", choice=EAGER), ("quick",), 35, **KERNELS),
    Part("pointwise", "cuda", bench(*OPS, choice=EAGER), ("quick",), 30, **KERNELS),
    # eager, because two processes would compile
    Part("same-twice-b4", "cuda", twice("B/4", 256, "--kappa 0.5 --variant ours-eager"), limit=30),
    Part("optimizer", "cuda", "-m benchmarks.optimizer {stamp}", limit=28),
    Part("accounting-xl2", "cuda", accounts("xl2"), limit=22),
    # what --full adds
    *(Part(f"{op}-all", "cuda", bench(op), ("full",), **KERNELS) for op in ("attention", *OPS)),
    *(Part(f"recipe-{name}", "cuda", recipe(name), ("full",)) for name in RECIPES),
    Part("projection", "cuda", "-m benchmarks.projection {merged} --rows {rows}", ("full",), 60, again=True),
    *(
        Part(f"variants-{name}-kappa{kappa}", "cuda", step(*size, f"--kappa {kappa}", COMPARED), ("full",))
        for name, size in ABLATED.items()
        for kappa in (0.5, 0)
    ),
    *(
        Part(f"ablation-{name}-{k}", "cuda", step(*size, "--kappa 0.5", ",".join(["ours", *names])), ("full",))
        for name, size in ABLATED.items()
        for k, names in enumerate(ABLATION, 1)
    ),
    *(
        Part(f"breakdown-{name}", "cuda", breakdown(name, *size, "--kappa 0.5"), ("full",))
        for name, size in ABLATED.items()
    ),
    Part("same-twice-xl2", "cuda", twice("XL/2", 16, "--kappa 0.5"), ("full",)),
    *(
        Part(f"scaling-{axis}-{variant}", "cuda", scaling(axis, variant, options), ("full",))
        for axis, options in SCALING.items()
        for variant in ("ours", "naive")
    ),
    *(
        # a batch a part, because each is compiled
        Part(f"inference-{name}-{batch}", "cuda", inference(model, batch), ("full",))
        for name, (model, _) in ABLATED.items()
        for batch in (1, 64)
    ),
    *(Part(f"accounting-{name}", "cuda", accounts(name), ("full",)) for name in RECIPES if name != "xl2"),
    # on a CPU
    Part("step-s8", "cpu", step("S/8", 4, TINY, "naive,ours-eager"), limit=90),
    Part("ablation-s8", "cpu", step("S/8", 4, TINY, ABLATION_CPU), limit=90),
    Part("same-twice-s8", "cpu", twice("S/8", 4, f"{TINY} --variant ours-eager --repeats 21"), limit=90),
    Part("attention", "cpu", bench("attention", choice="not compiled and hd72 and not N1024"), limit=60, **KERNELS),
    Part("pointwise", "cpu", bench("adaln", "linear", choice="not compiled"), limit=60, **KERNELS),
    Part("optimizer", "cpu", "-m benchmarks.optimizer --model S/8 --repeats 15 {stamp}", limit=60),
    Part("breakdown-s8", "cpu", breakdown("s8", "S/8", 4, f"{TINY} --eager --repeats 3"), limit=60),
    Part("scaling-s8", "cpu", scaling("batch", "ours-eager", f"--model S/8 --values 4,8,16 {TINY}"), limit=60),
    Part("inference-s2", "cpu", inference("S/2", 1, SAMPLED), limit=90),
    Part("accounting-b4", "cpu", accounts("b4"), limit=60),
    Part("step-s4", "cpu", step("S/4", 16, TINY, "naive,naive-compiled,ours"), ("full",)),
]
"""What is measured, in this order."""


def chosen(parts: list[Part], device: str, *, full: bool) -> list[Part]:
    return [part for part in parts if part.device == device and ("full" if full else "quick") in part.runs]
