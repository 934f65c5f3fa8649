"""adamw_ema against torch.optim.AdamW, torch._foreach_lerp_, fp64 and the official program."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import fresh
import pytest
import torch
from oracle import load, tensor
from tolerances import assert_error
from torch import nn

from meanflow_kernels.adamw_ema import adamw_ema, adamw_ema_bytes, adamw_ema_ref
from meanflow_kernels.adamw_ema.native import MISSING, warn_missing

HAS_GPU = torch.cuda.is_available()
needs_native = pytest.mark.skipif("cpu" in MISSING, reason=f"needs the native CPU library: {MISSING.get('cpu')}")
DEVICES = [
    pytest.param("cpu", marks=needs_native),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(HAS_GPU and "cuda" in MISSING, reason=MISSING.get("cuda", ""))],
    ),
]

# odd sizes, nothing at all, one element, one more than a block, more than a chunk; then what torch's vectors divide
ODD = [(1,), (3,), (0,), (17,), (33, 65), (5, 7, 11), (65,), (16 * 1024 + 5,), (3, 16 * 1024)]
EVEN = [(64,), (8, 128), (32, 1024), (4096, 16)]
REGIMES = {
    "official recipe": dict(betas=(0.9, 0.95), weight_decay=0.0, decays=(0.9999,)),
    "torch's defaults": dict(betas=(0.9, 0.999), weight_decay=0.01, decays=()),
    "four averages, strong decay": dict(betas=(0.9, 0.999), weight_decay=0.5, decays=(0.9999, 0.99, 0.5, 0.0)),
    "lerp from the far end": dict(betas=(0.3, 0.5), weight_decay=0.1, decays=(0.2,)),
    "no momentum": dict(betas=(0.0, 0.95), weight_decay=0.0, decays=(1.0,)),
}

# all bits of the mantissa set: rounding it like a number would carry into the sign
FULL_NAN = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)


def draw_gradients(shapes, steps, device="cpu"):
    """Gradients over many magnitudes, some of them zero."""
    scales = [10.0 ** -(k % 5) for k in range(steps)]
    grads = [[torch.randn(shape, device=device) * scale for shape in shapes] for scale in scales]
    for k, step in enumerate(grads):
        step[k % len(shapes)].zero_()
    return grads


class Ours:
    """Parameters and all that goes with them, stepped by ``step_fn``."""

    def __init__(self, params, decays, step_fn=adamw_ema, **settings):
        self.params = [p.clone() for p in params]
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in params]
        self.emas = {decay: [p.clone() for p in params] for decay in decays}
        self.copies = [p.bfloat16().contiguous() for p in params]
        self.step_fn, self.settings = step_fn, settings

    def step(self, grads):
        lists = self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps
        self.step_fn(*lists, emas=self.emas, copies=self.copies, **self.settings)

    def named(self):
        lists = {"params": self.params, "exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}
        return lists | {f"ema {decay}": ema for decay, ema in self.emas.items()}


class Torchs(Ours):
    """The same by torch.optim.AdamW, torch._foreach_lerp_ and a cast."""

    def __init__(self, params, decays, **settings):
        super().__init__(params, decays)
        self.leaves = [nn.Parameter(p.clone()) for p in params]
        self.adamw = torch.optim.AdamW(self.leaves, **{"fused": True} | settings)
        self.params = [p.detach() for p in self.leaves]

    def step(self, grads):
        for p, g in zip(self.leaves, grads, strict=True):
            p.grad = g.to(p.dtype)
        self.adamw.step()
        for decay, ema in self.emas.items():
            torch._foreach_lerp_(ema, self.params, 1 - decay)
        self.copies = [p.bfloat16() for p in self.params]
        self.exp_avgs, self.exp_avg_sqs = (
            [self.adamw.state[p][key] for p in self.leaves] for key in ("exp_avg", "exp_avg_sq")
        )


def run(params, grads, decays, step_fn=adamw_ema, **settings):
    state = Torchs(params, decays, **settings) if step_fn is None else Ours(params, decays, step_fn, **settings)
    for step in grads:
        state.step(step)
    return state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("regime", REGIMES)
def test_error_against_fp64(regime, device):
    """At most twice torch's own error, on odd sizes, after seven steps."""
    settings = REGIMES[regime] | {"lr": 1e-2, "eps": 1e-8}
    params = [torch.randn(shape, device=device) for shape in ODD]
    grads = draw_gradients(ODD, 7, device)
    ours, plain = run(params, grads, **settings), run(params, grads, step_fn=None, **settings)
    exact = run([p.double() for p in params], grads, step_fn=None, **settings)
    for name, tensors in ours.named().items():
        got, torchs, wanted = (
            torch.cat([x.flatten() for x in y]) for y in (tensors, plain.named()[name], exact.named()[name])
        )
        assert_error(got, wanted, torchs, name)
    for copied, p in zip(ours.copies, ours.params, strict=True):
        assert torch.equal(copied, p.bfloat16())


@needs_native
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch's loops have no FMA here"
)
@pytest.mark.parametrize("regime", REGIMES)
def test_same_bits_as_torchs_fused_adamw(regime):
    """Where torch's vectors divide the sizes, so that it runs no scalar tail, nothing differs in any bit."""
    settings = REGIMES[regime] | {"lr": 1e-2, "eps": 1e-8}
    params, grads = [torch.randn(shape) for shape in EVEN], draw_gradients(EVEN, 7)
    ours, plain = run(params, grads, **settings), run(params, grads, step_fn=None, **settings)
    for name, tensors in ours.named().items():
        for x, y in zip(tensors, plain.named()[name], strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("regime", REGIMES)
def test_reference_in_fp64_is_torchs(regime):
    settings = REGIMES[regime] | {"lr": 1e-2, "eps": 1e-8}
    params, grads = [torch.randn(shape).double() for shape in ODD], draw_gradients(ODD, 7)
    ours, plain = run(params, grads, step_fn=adamw_ema_ref, **settings), run(params, grads, step_fn=None, **settings)
    for name, tensors in ours.named().items():
        torch.testing.assert_close(tensors, plain.named()[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_official_program(device):
    """Twelve steps of the official optimizer and average, whose fp32 is 5e-8 from its fp64."""
    data, ema_data = load("optimizer"), load("ema")
    for k, lr in enumerate(data["lrs"]):
        state = Ours([tensor(data["p0"]).to(device)], (), lr=float(lr), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        for i, grad in enumerate(data["grads"]):
            state.step([tensor(grad).to(device)])
            wanted = tensor(data[f"f64/p_seq_{k}"][i])
            torch.testing.assert_close(state.params[0].cpu().double(), wanted, rtol=1e-6, atol=1e-6)
    decays = [float(x) for x in ema_data["alphas"]]
    state = Ours([tensor(ema_data["param_seq"][0]).to(device)], decays, lr=0.0, weight_decay=0.0)
    for i, p in enumerate(ema_data["param_seq"][1:]):
        state.params[0].copy_(tensor(p))
        state.step([torch.zeros_like(state.params[0])])
        for k, decay in enumerate(decays):
            wanted = tensor(ema_data[f"f64/ema_seq_{k}"][i + 1])
            torch.testing.assert_close(state.emas[decay][0].cpu().double(), wanted, rtol=1e-6, atol=1e-6)


@needs_native
def test_many_tensors_and_any_number_of_threads():
    """More tensors than one launch of the GPU takes; the same bits on one, two and three threads."""
    shapes = [(k % 37, 5) for k in range(900)] + [(3, 50_000)]
    params, grads = [torch.randn(shape) for shape in shapes], draw_gradients(shapes, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(params, grads, (0.9, 0.99), lr=1e-2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensors in other.named().items():
            assert all(map(torch.equal, tensors, results[0].named()[name])), name
        assert all(map(torch.equal, other.copies, results[0].copies))


@needs_native
@pytest.mark.parametrize("value", [float("nan"), FULL_NAN, float("inf"), 0.0, -0.0, 1e-40, 3.4e38])
def test_special_values(value):
    """As torch: a NaN spreads to its own element only, and the bf16 weights of all are torch's."""
    params, grads = [torch.randn(70)], [[torch.randn(70)]]
    params[0][3:4], grads[0][0][69:] = value, value
    ours, plain = run(params, grads, (0.9,), lr=1e-2), run(params, grads, (0.9,), step_fn=None, lr=1e-2)
    for name, tensors in ours.named().items():
        torch.testing.assert_close(tensors[0], plain.named()[name][0], rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)
    torch.testing.assert_close(ours.copies[0], ours.params[0].bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_native_operator_refuses_what_would_be_unsafe(device):
    """An error for every argument that is not what it should be; the process goes on."""
    program = [sys.executable, "-X", "faulthandler", Path(__file__).with_name("adamw_ema_refusals.py"), device]
    done = subprocess.run(program, env=fresh.environment(), capture_output=True, text=True, timeout=300)
    *calls, refused = done.stdout.splitlines() or ["none"]
    assert done.returncode == 0, f"exit {done.returncode} after call {len(calls) + 1}:\n{done.stdout}{done.stderr}"
    assert len(calls) > int(refused) > 40
    for wanted, got in map(json.loads, calls):
        assert (got is None) if wanted is None else str(got).startswith(f"adamw_ema: {wanted}"), (wanted, got)


def wrong(**changes):
    """A valid call's arguments, changed."""
    p = [torch.randn(3, 4), torch.randn(5)]
    like = lambda: [torch.zeros_like(x) for x in p]  # noqa: E731
    arguments = dict(params=p, grads=like(), exp_avgs=like(), exp_avg_sqs=like(), steps=[torch.zeros(()) for _ in p])
    return arguments | dict(lr=1e-3) | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(grads=[torch.zeros(3, 4)]), r"grads: got 1 tensors, wanted 2"),
        (dict(exp_avgs=[torch.zeros(4, 3), torch.zeros(5)]), r"exp_avgs\[0\]: got shape \(4, 3\), wanted \(3, 4\)"),
        (
            dict(exp_avg_sqs=[torch.zeros(3, 4), torch.zeros(5, device="meta")]),
            r"exp_avg_sqs\[1\]: got device meta, wanted cpu",
        ),
        (dict(grads=[torch.zeros(3, 4).to_sparse(), torch.zeros(5)]), r"grads\[0\]: got layout torch.sparse_coo"),
        (dict(steps=[torch.zeros(2), torch.zeros(())]), r"steps: got .* wanted 2 scalar tensors"),
        (dict(lr=torch.zeros(2)), r"lr: got a tensor of 2 elements"),
        (dict(lr=torch.zeros((), device="meta")), r"lr: got device meta, wanted cpu"),
        (dict(skip=torch.zeros(2)), r"skip: got 2 elements on cpu, wanted a scalar tensor on cpu"),
        (dict(betas=(0.9, 1.0)), r"betas: got \(0.9, 1.0\), wanted two numbers in \[0, 1\)"),
        (dict(eps=-1e-8), r"eps: got -1e-08"),
        (dict(weight_decay=-0.1), r"weight_decay: got -0.1"),
        (dict(emas={1.5: [torch.zeros(3, 4), torch.zeros(5)]}), r"emas: got decay 1.5"),
        (
            dict(emas={k / 10: [torch.zeros(3, 4), torch.zeros(5)] for k in range(5)}),
            r"emas: got 5 decays, wanted at most 4",
        ),
        (dict(emas={0.9: [torch.zeros(3, 4)]}), r"emas\[0.9\]: got 1 tensors"),
        (dict(copies=[torch.zeros(3, 4), torch.zeros(6)]), r"copies\[1\]: got shape \(6,\)"),
    ],
)
def test_error_messages(changes, message):
    with pytest.raises(ValueError, match=message):
        adamw_ema(**wrong(**changes))


@pytest.mark.parametrize("device", DEVICES)
def test_low_precision_gradients_are_widened(device):
    """Every other one in bf16, read as it is: the bits of a step on their fp32 values, NaN and all."""
    shapes = [*ODD, *EVEN]
    params = [torch.randn(shape, device=device) for shape in shapes]
    grads = [[g.bfloat16() if i % 2 else g for i, g in enumerate(step)] for step in draw_gradients(shapes, 3, device)]
    grads[-1][9].view(-1)[5] = float("nan")
    ours = run(params, grads, (0.9999, 0.5), lr=1e-2)
    widened = run(params, [[g.float() for g in step] for step in grads], (0.9999, 0.5), lr=1e-2)
    names = ours.named() | {"copies": ours.copies}
    for name, tensors in (widened.named() | {"copies": widened.copies}).items():
        for x, y in zip(names[name], tensors, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("case", ["fp64", "fp16 gradient", "transposed parameter"])
def test_other_dtypes_and_strides_take_plain_torch(case):
    """Right, and without a warning."""
    p = torch.randn(4, 6, dtype=torch.float64 if case == "fp64" else torch.float32)
    p = torch.randn(6, 4).t() if case == "transposed parameter" else p
    grads = [[torch.randn(4, 6, dtype=torch.float16 if case == "fp16 gradient" else p.dtype)] for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = run([p], grads, (0.9,), lr=1e-2)
    # torch's fused AdamW pairs the wrong elements where a gradient's strides are not its parameter's
    plain = run([p], grads, (0.9,), step_fn=None, lr=1e-2, fused=False)
    for name, tensors in ours.named().items():
        torch.testing.assert_close(tensors[0], plain.named()[name][0], rtol=1e-6, atol=1e-6)


def test_missing_library_warns_once_and_works(monkeypatch):
    monkeypatch.setitem(MISSING, "cpu", "native_cpu.so has not been built")
    warn_missing.cache_clear()
    params, grads = [torch.randn(5, 7)], draw_gradients([(5, 7)], 3)
    with pytest.warns(RuntimeWarning, match="native_cpu.so has not been built.*no-build-isolation") as caught:
        ours = run(params, grads, (0.9,), lr=1e-2)
    warn_missing.cache_clear()
    assert len(caught) == 1
    plain = run(params, grads, (0.9,), step_fn=None, lr=1e-2)
    torch.testing.assert_close(ours.params, plain.params, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.emas[0.9], plain.emas[0.9], rtol=1e-6, atol=1e-6)


def test_bytes():
    """Four reads and three writes of fp32, a read and a write for each average, a write of two bytes."""
    assert adamw_ema_bytes(10, emas=0, copies=False) == 280
    assert adamw_ema_bytes(10, emas=2, copies=True) == 280 + 160 + 20
    assert adamw_ema_bytes(10, emas=0, copies=False, bf16_grads=True) == 260


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler named c++")
def test_cuda_kernel_run_on_the_cpu(tmp_path):
    """The kernel's own source, thread by thread: chunks, tails, alignments, empty tensors; nothing else is written."""
    here = Path(__file__).parent
    flags = [
        "-O1",
        "-std=c++17",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fsanitize=alignment",
        "-fno-sanitize-recover",
    ]
    source, csrc = here / "adamw_ema_kernel_on_cpu.cpp", here.parents[1] / "csrc"
    subprocess.run(["c++", *flags, f"-I{csrc}", source, "-o", tmp_path / "run"], check=True)
    result = subprocess.run([tmp_path / "run"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) > 1_000_000


@pytest.mark.gpu
@pytest.mark.skipif(HAS_GPU and "cuda" in MISSING, reason=MISSING.get("cuda", ""))
def test_gpu_same_bits_as_cpu():
    """One arithmetic in both files; views of odd offsets take the path without 16-byte accesses."""
    shapes = [(k % 37, 5) for k in range(900)] + [(3, 50_000), (69_999,), (3,)]
    params, grads = [torch.randn(shape) for shape in shapes], draw_gradients(shapes, 3)
    cpu = run(params, grads, (0.9999, 0.9), lr=1e-2)
    gpu = Ours([p.cuda() for p in params], (0.9999, 0.9), lr=1e-2)
    flat = torch.empty(100_000, device="cuda")
    gpu.params[-2:] = [flat[1:70_000].copy_(params[-2]), flat[70_001:70_004].copy_(params[-1])]
    for step in grads:
        gpu.step([g.cuda() for g in step])
    for name, tensors in gpu.named().items():
        for x, y in zip(tensors, cpu.named()[name], strict=True):
            # the two powers behind the bias corrections may differ in the last place of a double
            torch.testing.assert_close(x.cpu(), y, rtol=3e-7, atol=3e-7, msg=name)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(gpu.copies, gpu.params, strict=True))
