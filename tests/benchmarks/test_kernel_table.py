"""The table of a step's kernels: kinds, sums and shares by hand, its rows, and the report that shows them."""

import html
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from report_rows import GPU, STEP
from test_report import build
from test_step_times import SMALL, event, options, ours, rows_of
from torch.utils.flop_counter import flop_registry

from benchmarks import breakdown
from benchmarks.counting import step_kernels
from benchmarks.counting.step_kernels import (
    OPERATORS,
    Activity,
    Counted,
    OperatorCalls,
    activities,
    kernel_rows,
    kind_of,
)
from benchmarks.harness.clock import Ceilings
from benchmarks.pages import kernel_table
from benchmarks.workloads import step_workload
from meanflow.model.build import build_net
from meanflow.objectives.build import make_objective
from meanflow_kernels.adamw_ema import adamw_ema_bytes
from meanflow_kernels.adamw_ema.native import MISSING

NAMES = Path(__file__).parents[1] / "data" / "kernel_names.txt"
# 1000 GB/s are 1e9 bytes a millisecond, 100 TFLOP/s 1e11 FLOPs
CEILINGS = Ceilings(copy_gbps=1000.0, gemm_tflops=100.0, gemm="made up")


def test_every_name_has_its_kind():
    lines = [line.split("\t") for line in NAMES.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len({name for _, name in lines}) > 100
    assert [(kind_of(name), name) for _, name in lines] == [tuple(line) for line in lines]


def test_every_kernel_and_operator_of_ours_has_a_share():
    names = [name for op in ("attention", *step_kernels.POINTWISE, "silu") for name in ours(op)]
    shares = {name: step_kernels.operator_of(name) for name in [*names, "_sum_partials_kernel", "adamw_ema_kernel<1>"]}
    assert None not in shares.values() and set(shares.values()) == set(OPERATORS)
    assert shares["_gate_adaln_bwd_kernel"] == "gate_adaln_bwd" and shares["_gate_adaln_kernel"] == "gate_adaln"
    assert shares["attention_kernel"] == "attention" and shares["attention_bwd_dq_kernel"] == "attention_bwd"
    lines = [line.split("\t")[1] for line in NAMES.read_text().splitlines() if not line.startswith("#")]
    library = [name for name in lines if re.search("flash|sdpa|fmha", name)]
    served = Counter(step_kernels.operator_of(name) for name in library)
    assert served == {"attention_bwd": 5, "attention": 3}
    registered = {name for op in flop_registry if (name := str(op)).startswith("meanflow_kernels.")}
    counted = {f"meanflow_kernels.{op}" for _, operators in OPERATORS.values() for op in operators}
    # that is torch's own copy
    registered -= {"meanflow_kernels.join"}
    assert len(registered) > 15 and registered <= counted


def cut(*found: Activity, counted=None, wall_ms=20.0) -> list[dict]:
    return kernel_rows(list(found), counted or {}, CEILINGS, wall_ms, steps=2)


def test_sums_of_a_profile_with_memsets_apart():
    cpu = torch.autograd.DeviceType.CPU
    events = [event("nvjet_hsh", 12.0), event("triton_poi_fused_add_0", 6.0), event("Memset (Device)", 3.0)]
    events += [
        event("Memcpy DtoD (Device -> Device)", 1.5),
        event("aten::mm", 9.0, cpu),
        event("loss", 9.0, annotation=True),
    ]
    rows = kernel_rows(activities(events, "cuda"), {}, CEILINGS, wall_ms=10.0, steps=3)
    assert [row["kernel"] for row in rows] == [each.key for each in events[:4]]
    assert [row["activity"] for row in rows] == ["kernel", "kernel", "memset", "memcpy"]
    assert [row["ms"] for row in rows] == [4.0, 2.0, 1.0, 0.5] and {row["launches"] for row in rows} == {1.0}
    assert rows[0]["us"] == 4000.0 and rows[0]["kernel_kind"] == "GEMM" and "operator" not in rows[0]
    words = "kernel 6.000 ms (2 times), memset 1.000 ms (1 times), memcpy 0.5000 ms (1 times), idle 2.500 ms."
    assert kernel_table.summary(rows) == f"A step under the profiler 10.00 ms: {words}"
    _, lines = kernel_table.lines(rows, 40)
    assert [line[0] for line in lines] == ["nvjet_hsh", "triton_poi_fused_add_0"]


def test_shares_by_hand():
    counted = {
        "attention": Counted(1, 2e10, 1e6), "attention_jvp": Counted(1, 4e10, 1e6),
        "attention_bwd": Counted(2, 5e10, 1e6), "adaln": Counted(4, 0, 3e8), "sum_partials": Counted(1, 0, 1e8),
    }  # fmt: skip
    rows = cut(
        Activity("attention_kernel", "kernel", "attention", 2.4, 6),
        Activity("flash_bwd_dq_dk_dv_loop", "kernel", "attention", 1.5, 4),
        Activity("flash_bwd_dot_do_o_kernel", "kernel", "attention", 0.5, 4),
        Activity("_adaln_kernel", "kernel", "pointwise", 1.0, 8),
        Activity("_sum_partials_kernel", "kernel", "pointwise", 0.25, 2),
        Activity("_silu_kernel", "kernel", "pointwise", 0.2, 2),
        Activity("nvjet", "kernel", "GEMM", 9.0, 2),
        counted=counted,
    )
    share = {row["kernel"]: row.get("share_of_ceiling") for row in rows}
    # 6e10 FLOPs in 1.2 ms, both operators of one kernel together
    assert share["attention_kernel"] == pytest.approx(0.5)
    # 5e10 FLOPs in the 1 ms of both kernels: the same share stands at either
    assert share["flash_bwd_dq_dk_dv_loop"] == share["flash_bwd_dot_do_o_kernel"] == pytest.approx(0.5)
    # 3e8 bytes in half a millisecond, 1e8 in an eighth
    assert share["_adaln_kernel"] == pytest.approx(0.6) and share["_sum_partials_kernel"] == pytest.approx(0.8)
    # nothing counted, and not ours
    assert share["_silu_kernel"] is None and share["nvjet"] is None
    (row,) = (row for row in rows if row["kernel"] == "attention_kernel")
    assert (row["operator"], row["calls"], row["flops"], row["operator_ms"]) == ("attention", 2, 6e10, 1.2)
    assert kernel_table.reached(row) == "50.00 TFLOP/s"


def test_calls_and_bytes_of_operators():
    b, length, c, n = 4, 16, 32, 1
    x = torch.empty(b, length, c, device="meta")
    y, vector = x.bfloat16(), torch.empty(b, 6 * c, dtype=torch.bfloat16, device="meta")[:, :c]
    ops = torch.ops.meanflow_kernels
    with OperatorCalls() as calls:
        x + x
        for _ in range(2):
            primals, tangents = (x, y, *[vector] * 3), (x[:n], y[:n], *[vector[:n]] * 3)
            ops.gate_adaln_jvp(*primals, x[0, 0], *tangents, b - n, n, 1e-6, torch.bfloat16)
        ops.bias_gelu_bwd(y[:1, :1], vector[0], y[:1, :1])
        qkv, lse = y.new_empty(b, length, 3, 2, 16), x.new_empty(b, 2, length)
        for dtype in (None, torch.bfloat16):
            ops.attention_qkv_bwd(qkv[:, :, 0], qkv, qkv[:, :, 0], lse, 1.0, dtype)
    rows, tangents = b * length * c, n * length * c
    # x and x_out fp32, y and h bf16, three vectors; the tangent's alike; and a bias in fp32
    dual = (4 + 4 + 2 + 2) * (rows + tangents) + 3 * 2 * c * (b + n) + 4 * c
    assert calls.found["gate_adaln_jvp"] == Counted(2, 0, 2 * dual)
    # x, dy and dx of one row, bias and dbias
    assert calls.found["bias_gelu_bwd"] == Counted(1, 0, 2 * 5 * c)
    # one row leaves one fp32 sum a column, and the result is bf16; of qkv's bias, where it is asked for, a row a sample
    assert calls.found["sum_partials"] == Counted(2, 0, (4 + 2) * c + (4 * b + 2) * 3 * c)
    assert set(calls.found) == {"gate_adaln_jvp", "bias_gelu_bwd", "attention_qkv_bwd", "sum_partials"}


def test_calls_of_a_step():
    work = step_workload.make_workload(options())
    example = make_objective(work.run).example
    plans = [example((2, 2)), example((4, 0)), example((4, 0))]
    counted = step_kernels.count_calls(work.run, plans)
    model = work.run.model
    shape = (model.depth, model.depth / 3)
    # a dual pass in all steps, and a guidance pass in one of them
    assert (counted["attention_qkv_jvp"].calls, counted["attention_qkv"].calls) == shape
    assert (counted["gate_adaln_jvp"].calls, counted["gate_adaln"].calls) == tuple(2 * calls for calls in shape)
    assert (
        counted["sum_partials"].calls
        == 4 * model.depth + 1
        == sum(counted[f"{op}_bwd"].calls for op in ("attention_qkv", "gate_adaln", "bias_gelu", "adaln"))
    )
    # 4 B H M N D of the primal, and twice that of the tangent's samples: 2 of the 4 once, all of them twice
    flops = 4 * 4 * model.tokens**2 * model.hidden_size * model.depth
    assert counted["attention_qkv_jvp"].flops == pytest.approx(flops + 2 * flops * 5 / 6)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_net(model).parameters())
    assert counted["adamw_ema"] == Counted(1, 0, adamw_ema_bytes(parameters, emas=1, copies=False))


def test_a_real_step_on_a_cpu(narrow, tmp_path, capsys, monkeypatch):
    # one recorded step is enough to add up
    monkeypatch.setattr(breakdown, "PROFILED_STEPS", 1)
    kernels, rows = tmp_path / "kernels.jsonl", tmp_path / "rows.jsonl"
    breakdown.main([*SMALL, "--eager", "--kernels", str(kernels), "--rows", str(rows)])
    found, (kinds,) = rows_of(kernels), rows_of(rows)
    # no parts, and the same profile by kind and by name
    assert kinds["by"] == "kind" and len(found) > 50 and {row["kind"] for row in found} == {"step-kernel"}
    by_kind = Counter()
    for row in found:
        by_kind[row["kernel_kind"]] += row["ms"]
    assert kinds["ms"] == {kind: pytest.approx(ms) for kind, ms in by_kind.items()}
    # the profiler's own range ends a little later
    assert sum(by_kind.values()) == pytest.approx(found[0]["wall_ms"], rel=0.02)
    assert len({row["date"] for row in found}) == 1
    assert {row["activity"] for row in found} == {"operator", "Python"} and found[0]["variant"] == "ours-eager"
    assert found == sorted(found, key=lambda row: -row["ms"])
    text = capsys.readouterr().out
    assert "A step under the profiler" in text and f"{len(found) - kernel_table.TOP} others" in text
    if "cpu" not in MISSING:
        (adam,) = (row for row in found if row.get("operator"))
        assert adam["share_of_ceiling"] == pytest.approx(adam["bytes"] / adam["operator_ms"] / 1e6 / adam["ceiling"])
        assert adam["kernel"] == "meanflow_kernels::adamw_ema" and "Measured: a copy's" in text
    reader, page = build(tmp_path, found)
    assert reader.cell("step-kernels", "kind", kernel="aten::mm") == "GEMM" and "idle" in page


def test_without_kernels_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(breakdown, "profile_steps", lambda *_, **__: breakdown.Profile([], 1.0, [], None))
    breakdown.main([*SMALL, "--eager", "--kernels", str(tmp_path / "kernels.jsonl")])
    assert f"no table of kernels: {breakdown.NO_KERNELS}\n" in capsys.readouterr().out
    assert not (tmp_path / "kernels.jsonl").exists()
    with pytest.raises(SystemExit, match="2"):
        breakdown.main([*SMALL, "--captured", "--kernels", "rows.jsonl"])
    assert "--device cpu, wanted --kernels and a GPU" in capsys.readouterr().err


def test_the_report_shows_the_longest(tmp_path):
    many = [Activity(f"triton_poi_fused_add_{k}", "kernel", "pointwise", 0.2, 2) for k in range(40)]
    counted = {"gate_adaln": Counted(2, 0, 8e8)}
    gate = Activity("_gate_adaln_kernel", "kernel", "pointwise", 2.0, 4)
    made = cut(gate, *many, Activity("Memset (Device)", "memset", "memory", 0.4, 8), counted=counted)
    columns = STEP | GPU | {"variant": "ours-captured"}
    older = [
        columns | row | {"date": "2029-01-01T00:00:00+00:00", "kernel": f"old {row['kernel']}"} for row in made[:2]
    ]
    reader, page = build(tmp_path, older + [columns | row for row in made])
    ((_, *lines),) = reader.sections["step-kernels"]
    assert len(lines) == kernel_table.TOP + 1 and lines[-1][0] == "11 others" and "old _gate" not in page
    gate = {"kernel": "_gate_adaln_kernel"}
    # a step's 1.0 of 5.2 ms; 8e8 bytes in it
    assert reader.cell("step-kernels", "share", **gate) == "19%"
    assert reader.cell("step-kernels", "launches", **gate) == "2.00"
    assert reader.cell("step-kernels", "rate", **gate) == "800.0 GB/s"
    assert reader.cell("step-kernels", "of the ceiling", **gate) == "80%"
    # 11 of 0.1 ms; the memsets stand above
    assert reader.cell("step-kernels", "ms a step", kernel="11 others") == "1.10"
    words = "A step under the profiler 20.00 ms: kernel 5.000 ms (42 times), memset 0.2000 ms (4 times), idle 14.80 ms."
    assert words in page and "a copy&#x27;s 1,000 GB/s" in page and "2 older rows" in html.unescape(page)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["kernel"].startswith("old")
