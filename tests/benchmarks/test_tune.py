"""The tuner: what it would sweep, that it refuses what is wrong, and what follows from its rows."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import chain, product
from pathlib import Path

import fresh
import pytest
import torch

pytest.importorskip("triton", reason="the tuner launches Triton kernels")

from benchmarks import tune
from benchmarks.pages.tuned_configs import entries
from benchmarks.tuning.subjects import ATTENTION, IMF_ROWS, SHAPES, subjects
from benchmarks.tuning.trials import Trial
from benchmarks.workloads.shapes import IMF
from meanflow_kernels.attention import config
from meanflow_kernels.bias_gelu.config import StripConfig
from meanflow_kernels.rows.config import RowConfig
from meanflow_kernels.swiglu.config import FlatConfig
from meanflow_kernels.tiling import TileConfig

ROOT = Path(__file__).parents[2]
COLUMNS = "op shape dtype table config entry shipped batch tokens heads head_dim device gpu commit date".split()


def _tune(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.tune", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=fresh.environment() | environment, capture_output=True, text=True)


def test_every_operator_is_listed_at_every_model(capsys):
    assert tune.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    attention, ops = {"attention", "attention_jvp", "attention_bwd"}, {"gate_adaln_jvp", "bias_gelu_bwd", "adaln_bwd"}
    imf = {name for op in IMF_ROWS for name in (op, f"{op}_jvp", f"{op}_bwd")}
    for op, model in chain(product(attention, ATTENTION), product(ops, SHAPES), product(imf, IMF)):
        found = [line for line in lines if line.startswith(f"{op} {model} ")]
        # the shipped config and at least two others
        assert found and all(line.partition(": ")[2].count(";") >= 2 for line in found), (op, model)
    assert any("SDPA cuDNN; SDPA flash" in line for line in lines)
    # the XL/2 step's attention with a tangent is worth most
    assert lines[0].startswith("attention_jvp XL/2 ")


def test_candidates_launch_different_things():
    for subject in subjects(90, "cuda"):
        assert subject.configs[0] == subject.shipped and len(subject.configs) > 1, subject.title
        assert len({subject.label(config) for config in subject.same}) == len(subject.same)
    # 384 columns are a warp's share or less: wider shares launch the same, and are timed once
    (small,) = (x for x in subjects(90, "cuda") if (x.op, x.model) == ("gate_adaln_bwd", "S/2"))
    free = dataclasses.replace(small.shipped, max_registers=None)
    wider = dataclasses.replace(free, columns_per_warp=768)
    assert small.same[wider] == free and wider not in small.configs


def test_entries_are_python():
    names = {name: getattr(config, name) for name in ("AttentionConfig", "PersistentConfig", "Backend")}
    names |= {"RowConfig": RowConfig, "StripConfig": StripConfig, "TileConfig": TileConfig, "FlatConfig": FlatConfig}
    for subject in subjects(90, "cuda"):
        for value in subject.same:
            assert eval(subject.entry(value), names) == value


def test_an_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.main(["attentoin", "--list"])
    assert "OP: got attentoin, wants some of attention_jvp, attention" in capsys.readouterr().err


OPS = ("attention_jvp", "attention_bwd library", "gate_adaln_bwd", "gate_adaln_bwd sums", "swiglu_bwd")


def test_a_run(tmp_path, capsys):
    """On tiny shapes in the interpreter, where there is no GPU."""
    path, device = tmp_path / "rows.jsonl", "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        # the shipped config and the first candidate are run however little time there is
        options = ["--device", device, "--seconds", "0.1", "--rows", str(path), "--commit", "abc"]
        assert tune.main([op, *options]) == 0
    out = capsys.readouterr().out
    assert out.count("Entries that should read otherwise") == len(OPS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["op"] for row in rows} == set(OPS)
    for row in rows:
        assert row["kind"] == "tune" and not [column for column in COLUMNS if column not in row], row
        assert row["device"] == device and row["commit"] == "abc"
        if row["ms"] is None:
            assert row["missing"]["ms"] == "not installed, or it does not take this dtype on this device"
        else:
            assert row["ms"] > 0 and row["error_of_bar"] <= 1


@pytest.mark.slow
def test_every_kernel_in_the_interpreter():
    run = _tune("--device", "cpu", "--seconds", "1000", TRITON_INTERPRET="1")
    assert run.returncode == 0 and "left out" not in run.stdout, run.stdout[-3000:]
    assert "does not run" not in run.stdout and "wrong" not in run.stdout


@pytest.fixture
def trial():
    """A kernel that copies x, which is 1, 2, 3."""
    x = torch.tensor([1.0, 2.0, 3.0])
    return Trial(
        launches=lambda config: (), outputs=(torch.empty(3),), plain=lambda exact: [x.double() if exact else x]
    )


def test_a_wrong_result_is_not_timed(trial):
    bar = tune.Bar(trial)
    assert bar.share((torch.tensor([1.0, 2.0, 3.0]),)) == 0
    with pytest.raises(tune.Refused, match="^wrong: result 0 is 2.7e-04 off fp64, at most 1.0e-06 may be"):
        bar.share((torch.tensor([1.0, 2.0, 3.001]),))
    with pytest.raises(tune.Refused, match="^wrong"):
        bar.share((torch.tensor([1.0, 2.0, float("nan")]),))


def _row(table: str, shape: str, entry: str, *gain: float) -> dict:
    gains = dict(zip(("20", "50", "80"), gain, strict=True)) if gain else None
    return {"op": "f", "table": table, "shape": shape, "entry": entry, "shipped": entry == "old", "gain": gains}


def test_an_entry_changes_where_all_its_shapes_gain_more_than_noise():
    rows = [
        *(_row("a", shape, "old", 1, 1, 1) for shape in ("x", "y")),
        *(_row("a", shape, "fast", 1.2, 1.25, 1.3) for shape in ("x", "y")),
        # faster where it runs
        _row("a", "x", "half", 2, 2, 2),
        _row("a", "y", "half"),
        _row("b", "x", "old", 1, 1, 1),
        _row("b", "x", "noise", 0.98, 1.04, 1.1),
    ]
    (entry,) = entries(rows)
    assert (entry["table"], entry["entry"], entry["shapes"]) == ("a", "fast", 2)
    assert entry["50"] == pytest.approx(1.25)


COMPILE = """
import json, sys
from benchmarks import static_report
from benchmarks.tuning import subjects as tune_subjects
print(json.dumps(static_report.report(tune_subjects.compile_cases(90), int(sys.argv[1]))))
"""


@pytest.mark.slow
def test_all_candidates_keep_the_rules_of_shipped_configs():
    command = [sys.executable, "-c", COMPILE, str(os.cpu_count())]
    run = subprocess.run(command, cwd=ROOT, env=fresh.environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) >= 10
    assert [f"{row['op']} {row['config']} {row['problems']}" for row in rows if row["problems"]] == []
