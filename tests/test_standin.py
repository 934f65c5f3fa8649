"""The GPU's stand-in runs what the host does for a GPU, and finds what a capture forbids."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from fresh import ROOT, environment

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or shutil.which("nvcc") is None,
    reason="needs a CUDA build of torch, nvcc and no GPU",
)


def on_standin(*arguments: str, devices: int = 1, **told: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/standin/run.py", *arguments]
    env = environment() | {"STANDIN_DEVICES": str(devices)} | told
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_a_training_step_is_captured():
    tests = ("tests/meanflow/training/test_training.py", "-k", "does_not_wait_for_the_gpu")
    done = on_standin("-m", "pytest", "-s", "-p", "no:cacheprovider", "-m", "gpu", *tests)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert "stand-in: captured" in done.stderr and "0 calls that a capture forbids" in done.stderr


OWN = {"CUDA_VISIBLE_DEVICES": "0,1"}
"""Each process sees its own device alone, where it knows of both."""
CAPTURED = {  # processes, what is told, options, collectives: a sum a bucket, and the guard's
    "one": (1, {}, ("batch=8",), 6),
    "two, accumulated": (2, OWN, ("accumulate=2",), 6),
    # a part of a sum each weight, and as many gathers
    "two, zero1": pytest.param(2, {}, ("accumulate=2", "parallel=zero1", "precision=bf16"), 51, marks=pytest.mark.slow),
}


@pytest.mark.parametrize("count, told, options, collectives", CAPTURED.values(), ids=CAPTURED)
def test_a_step_is_captured_with_its_sums(count, told, options, collectives):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    done = on_standin(*torchrun, "tests/standin/train.py", *options, devices=count, **told)
    assert done.returncode == 0 and done.stdout.count("40 steps, a size each") == count, done.stdout + done.stderr
    graphs = [int(n) for n in re.findall(r"captured .* and (\d+) collectives", done.stderr)]
    assert graphs.count(collectives) == 40 * count and set(graphs) <= {0, collectives}
    assert done.stderr.count(", 0 calls that a capture forbids") == count


COMPILED_BY_ANOTHER = """
from meanflow import startup
startup.see_own_gpu()
import torch
from torch._dynamo.utils import counters
from meanflow.world import choose_device

x = torch.ones(8, 8, device=choose_device("cuda"), requires_grad=True)
torch.compile(lambda x: torch.nn.functional.gelu(x @ x).sum())(x).backward()
found = (counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in ("miss", "hit"))
print(x.device, torch.cuda.device_count(), *found)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("told", "found"), [(OWN, "cuda:0 1 0 1"), ({}, "cuda:1 2 1 0")])
def test_a_process_that_sees_its_own_gpu_alone_loads_what_another_compiled(tmp_path, told, found):
    """One that sees both, of a machine without device files, compiles for its own number."""
    told = told | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "LOCAL_WORLD_SIZE": "2"}
    for rank in range(2):
        done = on_standin("-c", COMPILED_BY_ANOTHER, devices=2, LOCAL_RANK=str(rank), **told)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == found


@pytest.mark.slow
def test_a_compiled_step_is_captured():
    done = on_standin("-m", "benchmarks.step", *"--model S/8 --batch 16 --compare ours-captured --repeats 3".split())
    assert done.returncode == 0 and "stand-in for an H100" in done.stdout, done.stdout + done.stderr
    assert "0 calls that a capture forbids" in done.stderr


FORBIDDEN = {
    "a value read": "x.sum().item()",
    "a wait": "torch.cuda.synchronize()",
    "work elsewhere": "with torch.cuda.stream(other): x + 1",
    "work not joined": "other.wait_stream(torch.cuda.current_stream())\n    with torch.cuda.stream(other): x + 1",
    "the default stream": "torch.cuda.default_stream().wait_stream(torch.cuda.current_stream())",
}


@pytest.mark.parametrize("line", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_capture_forbids_is_found(line, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch
x, other = torch.ones(4, device="cuda"), torch.cuda.Stream()
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    {line}
""")
    done = on_standin(str(script))
    assert done.returncode != 0 and "a capture\n" in done.stderr + done.stdout, done.stderr


def test_devices_do_not_mix(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.ones(4, device='cuda') + torch.ones(4)")
    done = on_standin(str(script))
    assert done.returncode != 0 and "Expected all tensors to be on the same device" in done.stderr
