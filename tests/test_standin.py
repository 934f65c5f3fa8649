"""The GPU's stand-in runs what the host does for a GPU, and finds what a capture forbids."""

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


def on_standin(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/standin/run.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)


def test_a_training_step_is_captured():
    tests = ("tests/meanflow/training/test_training.py", "-k", "does_not_wait_for_the_gpu")
    done = on_standin("-m", "pytest", "-s", "-p", "no:cacheprovider", "-m", "gpu", *tests)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    assert "stand-in: captured" in done.stderr and "0 calls that a capture forbids" in done.stderr


@pytest.mark.slow
def test_a_compiled_step_is_captured():
    done = on_standin("-m", "benchmarks.step", *"--model S/8 --batch 16 --compare ours-captured --repeats 3".split())
    assert done.returncode == 0 and "stand-in for an H100" in done.stdout, done.stdout + done.stderr
    assert "0 calls that a capture forbids" in done.stderr


@pytest.mark.parametrize("line", ["x.sum().item()", "torch.cuda.synchronize()"])
def test_what_a_capture_forbids_is_found(line, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch
x = torch.ones(4, device="cuda")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    {line}
""")
    done = on_standin(str(script))
    assert done.returncode != 0 and "during a capture" in done.stderr + done.stdout, done.stderr


def test_devices_do_not_mix(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.ones(4, device='cuda') + torch.ones(4)")
    done = on_standin(str(script))
    assert done.returncode != 0 and "Expected all tensors to be on the same device" in done.stderr
