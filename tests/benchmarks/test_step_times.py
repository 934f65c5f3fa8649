"""The step's timings: numbers that can be recomputed, nothing timed that is wrong, parts, kinds, traces, revisions."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fresh
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import breakdown, inference, regression, report, scaling, step
from benchmarks.counting import step_kernels
from benchmarks.counting.accounts import account
from benchmarks.counting.step_kernels import activities, kind_of
from benchmarks.harness.environment import merge
from benchmarks.pages import ratios
from benchmarks.workloads import step_variants, step_workload
from meanflow_kernels.adamw_ema import native
from meanflow_kernels.adamw_ema.native import MISSING

KERNELS = Path(native.__file__).parents[1]
SMALL = "--device cpu --model S/8 --batch 4 --precision fp32 --repeats 2".split()

pytestmark = pytest.mark.usefixtures("narrow")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_agree_with_each_other(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    step.main([*SMALL, "--compare", "naive,ours-eager", "--rows", str(rows)])
    naive, ours = rows_of(rows)
    assert (naive["variant"], ours["variant"]) == ("naive", "ours-eager") and ours["kind"] == "step"
    for row in (naive, ours):
        assert row["device"] == "cpu" and row["gpu"] is None and row["mfu"] is None and row["commit"]
        assert row["images_per_second"] == pytest.approx(4 / row["ms"] * 1e3)
        assert row["tflops"] == pytest.approx(row["needed_flops"] / row["ms"] / 1e9)
        assert row["ms_20"] <= row["ms"] <= row["ms_80"]
    # one work for both: what the recipe needs, not what a variant wastes
    work = step_workload.make_workload(options())
    accounts = account(work.run, batches=100)
    needed = accounts["step_in_forwards_unpadded"] * accounts["forward_flops"]
    assert (ours["model"], ours["batch"], ours["tokens"]) == ("S/8", 4, 16)
    assert naive["needed_flops"] == ours["needed_flops"] == needed
    assert ours["times"].keys() == {"naive"} and naive["times"] == {}
    text = capsys.readouterr().out
    assert "CPU (" in text and f"{ours['ms']:.1f}" in text and "gradient" in text


def options(*more):
    import argparse

    parser = argparse.ArgumentParser()
    step_workload.add_workload_arguments(parser)
    return parser.parse_args([*SMALL, *more])


def test_what_is_missing_stays_said():
    row = merge({"ms": 1.0, "missing": {"joules_per_image": "no"}}, {"gpu": "a GPU", "missing": {"nvml": "none"}})
    assert row == {"ms": 1.0, "gpu": "a GPU", "missing": {"joules_per_image": "no", "nvml": "none"}}
    assert merge({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}


def test_bad_input():
    with pytest.raises(SystemExit, match="--compare: got .*'fastest'"):
        step.main(["--compare", "fastest", "--device", "cpu"])
    with pytest.raises(SystemExit, match="model: got 'Q/3'"):
        step.main(["--model", "Q/3", "--device", "cpu"])
    with pytest.raises(SystemExit, match="objective.kappa: got 2"):
        breakdown.main(["--kappa", "2", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("bench", [step, breakdown, scaling, inference], ids=lambda bench: bench.__name__)
def test_without_a_gpu_no_large_step_is_begun(bench, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--model", "XL/2"] + ["--axis", "batch"] * (bench is scaling))
    assert (
        exit.value.code == 2 and "torch sees no GPU, wanted one; --device cpu times it here" in capsys.readouterr().err
    )


def ours(op: str) -> list[str]:
    """The kernels of an operator, by the names that Triton gives them."""
    text = "".join(path.read_text() for path in (KERNELS / op).glob("*kernel.py"))
    found = re.findall(r"^def (\w+_kernel)\(\n", text, re.MULTILINE)
    assert found
    return found


def test_kernels_have_kinds():
    names = {
        "attention": [
            *ours("attention"),
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::bfloat16_t>>",
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1_kernel0_0",
            "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>",
            "triton_red_fused__softmax__to_copy_mul_4",
        ],
        "GEMM": [
            "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
            "nvjet_hsh_128x256",
            "sm90_xmma_gemm_bf16bf16",
            "aten::addmm",
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>",
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>",
            "ampere_sgemm_128x64_tn",
            "void gemv2T_kernel_val<int, int, __nv_bfloat16, float>",
        ],
        "optimizer": [
            "adamw_ema_kernel(Table, Settings, double const*, double, float const*)",
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>",
        ],
        "memory": [
            "Memcpy HtoD (Pinned -> Device)",
            "Memcpy DtoD (Device -> Device)",
            "Memset (Device)",
            "aten::copy_",
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 2, 128, 1>",
        ],
        # a cast or a product in the name of Inductor's is what was fused, not what it does
        "pointwise": [
            *(name for op in (*step_kernels.POINTWISE, "silu") for name in ours(op)),
            "triton_poi_fused_add_3",
            "triton_red_fused__to_copy_native_layer_norm_view_7",
            "aten::mul",
            "triton_per_fused__to_copy_addmm_sum_12",
            "triton_poi_fused_copy_mm_0",
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        ],
    }
    for kind, found in names.items():
        assert {name: kind_of(name) for name in found} == dict.fromkeys(found, kind)


def event(key, ms, device_type=DeviceType.CUDA, annotation=False):
    return SimpleNamespace(
        key=key, device_type=device_type, is_user_annotation=annotation, self_cpu_time_total=1e3 * ms,
        self_device_time_total=1e3 * ms, count=3,
    )  # fmt: skip


def kinds(events, device):
    """Milliseconds of each kind in all steps, waiting left out."""
    profile = breakdown.Profile(activities(events, device), 0.0, [], None)
    ms = breakdown.by_kind(profile, device)
    return {kind: pytest.approx(breakdown.PROFILED_STEPS * ms[kind]) for kind in ms if kind != breakdown.IDLE}


def test_a_gpus_kernels_count_once():
    # an operator's event and a named range repeat the time of the kernels below them
    events = [event("aten::mm", 5.0, DeviceType.CPU), event("loss", 7.0, annotation=True)]
    events += [event("nvjet_hsh_128x256", 5.0), event("_attention_jvp_kernel", 2.0)]
    assert kinds(events, "cuda") == {"GEMM": 5.0, "attention": 2.0}


@pytest.fixture
def profiled(monkeypatch):
    """A GPU's profile made of given events; the list of what was asked of it, in order."""
    asked, clock = [], iter(range(0, 1000, 10))

    class Profile:
        def __init__(self, **_):
            pass

        def __enter__(self):
            asked.append("start")
            return self

        def __exit__(self, *_):
            asked.append("stop")

        def step(self):
            asked.append("record")

        def key_averages(self):
            return profiled.events

    def profiled(events):
        profiled.events = events
        work = SimpleNamespace(device="cuda", inputs=lambda k: SimpleNamespace(plan=k))
        profile = breakdown.profile_steps(work, None, compile=True)
        # the last three steps' plans: those before them were not recorded
        assert profile.plans == [3, 4, 5]
        return profile

    variant = SimpleNamespace(prepare=lambda inputs: None, step=lambda: asked.append("step"))
    monkeypatch.setattr(breakdown, "Ours", lambda work, **train: variant)
    monkeypatch.setattr(breakdown, "profile", Profile)
    monkeypatch.setattr(breakdown, "stamp", lambda device: asked.append("stamp") or next(clock))
    profiled.asked = asked
    return profiled


def test_waiting_is_what_no_kernel_fills(profiled):
    profile = profiled([event("nvjet_hsh_128x256", 3.0), event("aten::mm", 3.0, DeviceType.CPU)])
    found = breakdown.by_kind(profile, "cuda")
    # three steps in ten milliseconds
    assert found == {"GEMM": pytest.approx(1.0), "idle": pytest.approx(7 / 3)}
    # the profiler starts and makes its first record outside of what is timed
    steps = ["stamp", *["step"] * breakdown.PROFILED_STEPS, "stamp"]
    assert profiled.asked[-len(steps) - 2 :] == ["record", *steps, "stop"]
    assert profiled.asked.index("start") < profiled.asked.index("record")


def test_a_profile_without_kernels_is_no_waiting(profiled, monkeypatch, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    nothing = profiled([event("aten::mm", 3.0, DeviceType.CPU)])
    assert breakdown.by_kind(nothing, "cuda") == {}
    monkeypatch.setattr(breakdown, "profile_steps", lambda *_, **__: nothing)
    breakdown.main([*SMALL, "--eager", "--rows", str(rows)])
    part, kind = rows_of(rows)
    assert part["ms"]["backward"] > 0 and kind["ms"] == {} and "no kernel" in kind["missing"]["ms"]
    assert "by kind: not told apart: the profiler saw no kernel" in capsys.readouterr().out
    report.main([str(rows), "--out", str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert "ours-eager by kind was not told apart: the profiler saw no kernel" in text and "by kind</th>" not in text


def test_a_cpus_operators_have_kinds():
    cpu = DeviceType.CPU
    events = [event("aten::bmm", 3.0, cpu), event("aten::_softmax", 1.0, cpu), event("aten::mm", 5.0, cpu)]
    events += [
        event("loss", 7.0, cpu, annotation=True),
        event("aten::mul", 2.0, cpu),
        event("CompiledFunction", 4.0, cpu),
    ]
    found = kinds(events, "cpu")
    assert found == {"attention": 4.0, "GEMM": 5.0, "Python": 7.0, "pointwise": 2.0, "compiled, not told apart": 4.0}


def test_breakdown_and_trace(tmp_path, capsys):
    rows, trace = tmp_path / "rows.jsonl", tmp_path / "trace" / "step.json"
    breakdown.main([*SMALL, "--eager", "--rows", str(rows), "--trace", str(trace)])
    parts, kinds = (row["ms"] for row in rows_of(rows))
    assert parts.keys() == {"draw", "guidance", "primal", "tangent", "backward", "optimizer"}
    assert all(kinds[kind] > 0 for kind in ("GEMM", "attention", "pointwise", "optimizer"))
    assert rows_of(rows)[1]["trace"] == "step.json"
    found = Counter(event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X")
    ranges = ("draw", "loss", "guidance", "primal and tangent", "backward", "optimizer")
    assert [found[name] for name in ranges] == [breakdown.PROFILED_STEPS] * 6
    assert "by phase" in capsys.readouterr().out


def test_scaling(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    axis = [*SMALL, "--axis", "tokens", "--variant", "ours-eager", "--rows", str(rows)]
    scaling.main([*axis, "--values", "4,16"])
    small, large = rows_of(rows)
    assert (small["tokens"], large["tokens"]) == (4, 16) and small["needed_flops"] < large["needed_flops"]
    assert large["kind"] == "scaling" and large["axis"] == "tokens" and large["ms"] > 0

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(step_variants.VARIANTS, "ours-eager", full)
    rows.unlink()
    assert scaling.main([*axis, "--values", "16,64"]) == 0
    (row,) = rows_of(rows)
    assert row["ms"] is None and row["missing"]["ms"] == "out of memory"
    assert "out of memory" in capsys.readouterr().out
    for wrong in ("15", "many"):
        with pytest.raises(SystemExit, match=f"--values: got '{wrong}', wanted a square number of tokens"):
            scaling.main([*axis, "--values", wrong])


def test_a_preset_is_a_workload():
    work = step_workload.make_workload(options("--preset", "imagenet-xl2"))
    row = step_workload.identity(work, "imagenet-xl2")
    assert (row["model"], row["tokens"], row["kappa"], row["interval"]) == ("XL/2", 256, 0.92, [0.0, 0.75])


def test_a_folder_is_another_tree(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "regression.py").touch()
    with regression.sides_of(str(tmp_path)) as tree:
        assert tree == tmp_path.resolve()


def run_regression(*arguments):
    command = [sys.executable, "-m", "benchmarks.regression", *SMALL, "--variant", "ours-eager", *arguments]
    return subprocess.run(command, cwd=fresh.ROOT, env=fresh.environment(), capture_output=True, text=True, timeout=300)


def test_a_revision_that_is_not_there():
    done = run_regression("--base", "no-such-revision")
    assert done.returncode == 2 and "--base: got 'no-such-revision', wanted a revision" in done.stderr


@pytest.mark.slow
def test_against_a_revision():
    done = run_regression("--base", "HEAD", "--tolerance", "10")
    assert done.returncode == 0, done.stderr
    assert "HEAD" in done.stdout and "2 pairs): not slower" in done.stdout


@pytest.mark.slow
def test_the_same_version_twice(tmp_path):
    # two pairs say too little to ask for agreement: what it says has to be what it measured
    done = run_regression("--self-check", "--rows", str(tmp_path / "rows.jsonl"))
    (row,) = rows_of(tmp_path / "rows.jsonl")
    within = row["ratio"]["20"] <= 1 <= row["ratio"]["80"]
    assert row["base"] == ratios.ITSELF and row["turns"] == 2
    assert done.returncode == (0 if within else 1) and ("agrees" if within else "DISAGREES") in done.stdout


class Side:
    """A revision whose steps take ``ms`` and the noise of a machine that slows down now and then, both sides alike."""

    def __init__(self, ms: float, seed: int = 0):
        self.ms, self.noise = ms, random.Random(seed)

    def answer(self):
        return regression.READY

    def step(self, number):
        shared = 2.0 if number % 7 == 0 else 1.0
        return self.ms * shared * self.noise.uniform(0.97, 1.03)


def compared(here: float, there: float, base: str) -> dict:
    return regression.compare(Side(here, 1), Side(there, 2), 41) | {"base": base}


def test_a_ratio_is_of_the_pairs():
    row = regression.compare(Side(220.0), Side(200.0), 11)
    # the same noise on both sides
    assert row["ratio"] == {q: pytest.approx(1.1) for q in ("20", "50", "80")} and row["turns"] == 11
    assert row["ms"] / row["base_ms"] == pytest.approx(1.1)


@pytest.mark.parametrize("ms", [202.0, 200.0, 198.0])
def test_noise_alone_agrees(ms):
    assert regression.verdict(compared(ms, 200.0, ratios.ITSELF), 0.03) == ("agrees: 1 lies within", False)


@pytest.mark.parametrize("ms", [220.0, 180.0], ids=["slower", "faster"])
def test_another_speed_of_the_same_version_disagrees(ms):
    assert regression.verdict(compared(ms, 200.0, ratios.ITSELF), 0.03) == ("DISAGREES: 1 lies outside", True)


def test_a_slower_revision_is_called_slower():
    assert regression.verdict(compared(220.0, 200.0, "main"), 0.03) == ("SLOWER", True)
    assert regression.verdict(compared(200.0, 200.0, "main"), 0.03) == ("not slower", False)
    assert regression.verdict(compared(180.0, 200.0, "main"), 0.03) == ("not slower", False)


def test_native_libraries_go_along():
    if "cpu" in MISSING:
        pytest.skip(f"no native library here: {MISSING['cpu']}")
    with regression.checkout("HEAD") as tree:
        assert (tree / "kernels/meanflow_kernels/native_cpu.so").exists()
    assert not tree.exists()
