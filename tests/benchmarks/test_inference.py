"""benchmarks.inference: rows that agree with each other, outputs compared before anything is timed, reasons said."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import fresh
import pytest
import torch

from benchmarks import inference, report
from benchmarks.workloads import decoders
from meanflow.method.sampling import Sampler
from meanflow.training.flops import sample_flops

TINY = "--device cpu --model S/4 --input-size 8 --batch 2 --repeats 3".split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A decoder of four small blocks in the place of Stable Diffusion's, and the process's settings afterwards."""
    small = decoders.SD_VAE | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    monkeypatch.setattr(decoders, "SD_VAE", small)
    # so small a one is quick on any CPU
    monkeypatch.setattr(decoders, "cpu_convolves_bf16", lambda: True)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(path, *args: str) -> tuple[int, list[dict]]:
    code = inference.main([*TINY, "--rows", str(path), *args])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def pick(rows: list[dict], part: str, variant: str, precision: str = "fp32", steps: int | None = None) -> dict:
    wanted = (part, variant, precision, steps)
    (row,) = [r for r in rows if (r["part"], r["variant"], r["precision"], r["steps"]) == wanted]
    return row


def test_rows_agree_with_each_other(tmp_path, capsys):
    pytest.importorskip("diffusers")
    path = tmp_path / "rows.jsonl"
    code, rows = run(
        path, "--network", "eager", "cuda-graph", "--decode", "plain", "tiling", "bf16", "--steps", "1", "2"
    )
    # a graph is timed beside a compiled decoder, and there is none
    assert code == 0 and len(rows) == 2 * 2 * 2 + 3 + 2 * 2
    for row in (row for row in rows if row["ms"]):
        assert row["ms_20"] <= row["ms"] <= row["ms_80"] and row["samples"] == 3
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert row["commit"] and row["device"] == "cpu" and row["mfu"] is None
    one, two = (pick(rows, "network", "eager", steps=steps) for steps in (1, 2))
    decode, sample = pick(rows, "decode", "plain"), pick(rows, "sample", "eager", steps=2)
    forward = sample_flops(inference.ModelConfig.official("S/4", input_size=8)).forward
    assert two["flops"] == 2 * one["flops"] == 4 * forward
    assert decode["flops"] > 0 and sample["flops"] == decode["flops"] + two["flops"]
    assert "vae" not in one and "random weights" in decode["vae"] and sample["decode"] == "plain"
    assert all(0 < sample["share_of_decode"][level] < 1 for level in ("20", "50", "80"))
    low = pick(rows, "network", "eager", "bf16", 1)
    assert low["against"] == "eager, fp32" and 0 < low["difference"] < 0.05
    assert pick(rows, "network", "cuda-graph", steps=1)["missing"]["ms"] == "CUDA graphs need a GPU"
    assert pick(rows, "decode", "tiling")["missing"]["ms"] == "latents of 8 are no larger than a tile, 32"
    text = capsys.readouterr().out
    assert f"{decode['ms']:.2f}" in text and "network cuda-graph: not timed: CUDA graphs need a GPU" in text
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "A one-step sample: S/4, batch 2, latents of 8" in page and "0 rows" not in page


@pytest.mark.parametrize("part", ["network", "decode"])
def test_nothing_is_timed_that_is_another(tmp_path, monkeypatch, part):
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    if part == "network":
        right = Sampler.__call__

        def call(self, noise, y, times):
            # in bf16 alone it goes astray
            return right(self, noise, y, (1.0, 0.1) if self.net.dtype == torch.bfloat16 else times)

        monkeypatch.setattr(Sampler, "__call__", call)
    else:
        decode = AutoencoderKL.decode
        flipped = lambda self, z, **k: decode(self, z if z.dtype == torch.float32 else z.flip(-1), **k)  # noqa: E731
        monkeypatch.setattr(AutoencoderKL, "decode", flipped)
    with pytest.raises(SystemExit, match=f"^{part} (eager|bf16), bf16: its output is .* off that of .* was timed$"):
        run(tmp_path / "rows.jsonl", "--network", "eager", "--decode", "plain", "bf16", "--steps", "1")
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(("device", "precision", "off", "judged"), [
    ("cpu", "fp32", 5e-3, True), ("cuda", "fp32", 5e-3, False), ("cuda", "fp32", 2e-2, True),
    ("cuda", "bf16", 2e-2, False),
])  # fmt: skip
def test_fp32_on_a_gpu_may_differ_by_the_rounding_of_tf32(monkeypatch, device, precision, off, judged):
    monkeypatch.setattr(inference, "stamp", lambda device: 0.0)
    monkeypatch.setattr(inference, "working_memory", lambda call: 0)
    work = SimpleNamespace(device=device, noise=torch.zeros(4))
    way = inference.Way("network", "compiled", precision, 1, (lambda noise: torch.full((4,), 1 + off),))
    wanted = {way.group: ("eager, fp32", torch.ones(4))}
    if judged:
        with pytest.raises(SystemExit, match="nothing was timed"):
            inference.first_call(work, way, wanted)
    else:
        assert inference.first_call(work, way, wanted)["difference"] == pytest.approx(off, rel=1e-3)


REHEARSED = """
import runpy
from types import SimpleNamespace
import torch
# as python -m does it
inference = runpy.run_module("benchmarks.inference", run_name="rehearsed")
inference |= {"stamp": lambda device: 0.0, "working_memory": lambda call: 0}
work = SimpleNamespace(device="cuda", noise=torch.zeros(4))
for precision in ("fp32", "bf16"):
    for found in (2.0, float("nan")):
        way = inference["Way"]("network", "compiled", precision, 1, (lambda noise: torch.full((4,), found),))
        print(inference["first_call"](work, way, {way.group: ("eager, fp32", torch.ones(4))})["difference"])
"""


def test_a_rehearsal_on_a_gpus_stand_in_asks_for_no_agreement():
    # there kernels compute nothing, and any two outputs differ
    env = fresh.environment()
    env["PYTHONPATH"] = os.pathsep.join([str(fresh.ROOT / "tests" / "standin" / "site"), env["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", REHEARSED], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["1.0", "nan", "1.0", "nan"], done.stderr


def test_a_way_that_fails_stops_no_other(tmp_path, monkeypatch, capfd):
    AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
    real = AutoencoderKL.decode

    def decode(self, z, **kwargs):
        if z.dtype == torch.float16:
            raise RuntimeError("no such algorithm\nat line 3")
        return real(self, z, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    options = "--network eager --precision fp32 --decode plain fp16 --steps 1".split()
    code, rows = run(tmp_path / "rows.jsonl", *options)
    failed = pick(rows, "decode", "fp16", "fp16")
    assert code == 1 and failed["failed"] and failed["missing"]["ms"] == "RuntimeError: no such algorithm"
    assert pick(rows, "decode", "plain")["ms"] > 0 and pick(rows, "sample", "eager", steps=1)["ms"] > 0


def test_without_diffusers_the_network_is_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    options = "--network eager --precision fp32 --decode plain slicing --steps 1".split()
    code, rows = run(tmp_path / "rows.jsonl", *options)
    assert code == 0 and pick(rows, "network", "eager", steps=1)["ms"] > 0
    for row in rows[1:]:
        assert row["missing"]["ms"].startswith("the decoder needs diffusers (")


def test_bf16_is_passed_over_where_a_cpu_would_take_minutes(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bw": False})
    option = decoders.DECODES["bf16"]
    assert "AVX-512" in option.passed_over(None, torch.zeros(1))
    # other devices, and fp32, are asked as before
    vae = SimpleNamespace(tile_latent_min_size=32)
    assert option.passed_over(vae, torch.zeros(1, device="meta")) is None
    assert decoders.DECODES["plain"].passed_over(vae, torch.zeros(1)) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert option.passed_over(vae, torch.zeros(1)) is None


def test_slices_and_tiles_of_larger_latents(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    # tiles of 8 x 8 latents
    monkeypatch.setitem(decoders.SD_VAE, "sample_size", 64)
    options = "--input-size 16 --model S/8 --network eager --precision fp32 --decode plain slicing tiling --steps 1"
    _, rows = run(tmp_path / "rows.jsonl", *options.split())
    assert pick(rows, "decode", "slicing")["difference"] < 1e-4
    # seams are told, not judged
    assert pick(rows, "decode", "tiling")["difference"] > inference.TOLERANCE["fp32"]


@pytest.mark.parametrize("line, message", {
    "--batch 0": "batch: got 0", "--steps 0": "steps: got 0", "--model Q/3": "model: got 'Q/3'",
}.items())  # fmt: skip
def test_bad_input(line, message):
    with pytest.raises(SystemExit, match=message):
        inference.main([*TINY, *line.split()])


def test_a_decoder_that_is_not_there():
    pytest.importorskip("diffusers")
    with pytest.raises(SystemExit, match="vae: got '/nowhere', which cannot be loaded"):
        inference.main([*TINY, "--vae", "/nowhere"])


@pytest.mark.slow
def test_compiled_ways_are_the_same(tmp_path):
    pytest.importorskip("diffusers")
    options = "--network eager compiled --decode plain compiled bf16-channels-last bf16-compiled --steps 1".split()
    code, rows = run(tmp_path / "rows.jsonl", *options)
    assert code == 0 and all(row["ms"] for row in rows)
    assert pick(rows, "sample", "compiled", "bf16", 1)["decode"] == "bf16-compiled"


@pytest.mark.gpu
def test_every_way_runs_on_a_gpu(tmp_path):
    code, rows = run(tmp_path / "rows.jsonl", "--device", "cuda", "--model", "B/4", "--input-size", "32")
    assert code == 0
    reasons = [row["missing"]["ms"] for row in rows if not row["ms"]]
    tile = "latents of 32 are no larger than a tile, 32"
    assert all(why == tile or why.startswith("the decoder needs diffusers") for why in reasons)
    assert all(row["ms"] for row in rows if row["part"] == "network")
    assert all(row["call_bytes"] > 0 for row in rows if row["ms"] and row["part"] == "decode")
