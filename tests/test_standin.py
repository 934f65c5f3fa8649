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


def on_standin(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/standin/run.py", *arguments]
    env = environment() | {"STANDIN_DEVICES": str(devices)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


def test_a_training_step_is_captured():
    tests = ("tests/meanflow/training/test_training.py", "-k", "does_not_wait_for_the_gpu")
    done = on_standin("-m", "pytest", "-s", "-p", "no:cacheprovider", "-m", "gpu", *tests)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert "stand-in: captured" in done.stderr and "0 calls that a capture forbids" in done.stderr


CAPTURED = {  # processes, options, collectives: a sum a bucket, and the guard's
    "one": (1, ("batch=8",), 6),
    "two, accumulated": (2, ("accumulate=2",), 6),
    # a part of a sum each weight, and as many gathers
    "two, zero1": pytest.param(2, ("accumulate=2", "parallel=zero1", "precision=bf16"), 51, marks=pytest.mark.slow),
}


@pytest.mark.parametrize("count, options, collectives", CAPTURED.values(), ids=CAPTURED)
def test_a_step_is_captured_with_its_sums(count, options, collectives):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    done = on_standin(*torchrun, "tests/standin/train.py", *options, devices=count)
    assert done.returncode == 0 and done.stdout.count("40 steps, a size each") == count, done.stdout + done.stderr
    graphs = [int(n) for n in re.findall(r"captured .* and (\d+) collectives", done.stderr)]
    assert graphs.count(collectives) == 40 * count and set(graphs) <= {0, collectives}
    assert done.stderr.count(", 0 calls that a capture forbids") == count


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
