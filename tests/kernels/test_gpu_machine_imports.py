"""Kernels, step, benches and GPU tests run where the package's other dependencies and the peers are not installed."""

import re
from pathlib import Path

import pytest
from fresh import run_bare

ROOT = Path(__file__).parents[2]

COUNT = """
import torch, meanflow_kernels as mk
from meanflow_kernels.routing import Route, force_route
from torch.utils.flop_counter import FlopCounterMode

q = torch.empty(2, 8, 2, 16, device="meta")
with force_route(Route.TRITON), FlopCounterMode(display=False) as counter:
    mk.attention_jvp((q, q, q), (q, q, q))
print("FLOPs:", counter.get_total_flops())
"""

REFUSAL = """
x = torch.randn(1, 5, 2, 16)
try:
    with force_route(Route.TRITON):
        mk.attention(x, x, x)
except Exception as error:
    print("refused:", error)
"""

OPERATORS = """
def pair(*size):
    return torch.randn(2, *size)

q, k, v = (pair(2, 8, 2, 16) for _ in range(3))
x, y, hidden = (pair(2, 8, 32) for _ in range(3))
gate, shift, scale = (pair(2, 32) for _ in range(3))
t = pair(2)
weight, bias = torch.randn(16, 32), torch.randn(32)

def zip_pairs(*pairs):
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)

results = [
    mk.attention_jvp(*zip_pairs(q, k, v)),
    mk.attention_qkv_jvp(*zip_pairs(pair(2, 8, 3, 2, 16))),
    mk.adaln_jvp(*zip_pairs(x, shift, scale)),
    *mk.gate_adaln_jvp(*zip_pairs(x, y, gate, shift, scale)),
    *mk.gate_rmsnorm_jvp(*zip_pairs(x, y), bias, bias),
    mk.bias_gelu_jvp(*zip_pairs(hidden), bias),
    *mk.qk_rope_jvp(*zip_pairs(pair(2, 8, 2, 2, 16)), *torch.randn(2, 16), *torch.randn(2, 8, 8)),
    mk.rmsnorm_jvp(*zip_pairs(x), bias),
    mk.silu_jvp(*zip_pairs(hidden)),
    mk.swiglu_jvp(*zip_pairs(hidden)),
    mk.linear_jvp(*zip_pairs(hidden), weight),
    mk.timestep_embedding_jvp(*zip_pairs(t), 16),
]
assert len(results) == len([name for name in mk.__all__ if name.endswith("_jvp")]) + 3
assert all(tensor.isfinite().all() for result in results for tensor in result)
"""

STEP = """
import torch
from meanflow.objectives.meanflow import meanflow_terms
from meanflow.training.optim import make_optimizer
from meanflow.presets import preset
from meanflow.model.build import build_net

config = preset("digits")
net = build_net(config.model)
x, e = torch.randn(2, 4, 1, 8, 8)
t, r = torch.rand(2, 4).sort(0, descending=True)[0]
y, drop = torch.arange(4), torch.zeros(4, dtype=torch.bool)
meanflow_terms(config.objective, net, x, e, r, t, y, drop).loss.backward()
make_optimizer(config.optim, net).step()
assert all(p.isfinite().all() for p in net.parameters())
"""

BENCH = """
from benchmarks import optimizer, report, step, suite
from meanflow import recipe

# two narrow blocks in the place of S's twelve
recipe.DIT_SIZES["S"] = (2, 64, 2)
step.main("--device cpu --model S/8 --batch 4 --precision fp32 --repeats 1 --compare naive,ours-eager".split())
optimizer.main("--device cpu --model S/8 --repeats 2".split())
"""


@pytest.mark.parametrize("name", ["tyro", "diffusers", "flash_attn.flash_attn_interface"])
def test_the_block_blocks(name):
    assert f"No module named {name.partition('.')[0]!r}" in run_bare(f"import {name}").stderr


@pytest.fixture(scope="module")
def run():
    """All in one fresh process, where each begins with what those before have imported."""
    return run_bare(COUNT + REFUSAL + OPERATORS + STEP + BENCH)


def test_importing_the_package_is_enough_to_count(run):
    assert f"FLOPs: {12 * 2 * 2 * 8 * 8 * 16}\n" in run.stdout, run.stderr


def test_cpu_tensors_without_the_interpreter_raise_a_clear_error(run):
    assert re.search("refused: .*set TRITON_INTERPRET=1 before the first import of triton", run.stdout), run.stderr


def test_code_runs(run):
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_gpu_tests_are_collected():
    kernels = (ROOT / "tests/kernels").glob("test_*.py")
    others = [path for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    arguments = ["-q", "-p", "no:cacheprovider", "--collect-only", *sorted({str(path) for path in [*kernels, *others]})]
    run = run_bare(f"import pytest; sys.exit(pytest.main({arguments!r}))")
    assert run.returncode == 0 and "test_attention" in run.stdout, run.stdout[-3000:]
