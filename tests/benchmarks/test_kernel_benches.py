"""Every operator has its bench, and each runs on a CPU with rows that say so."""

import json
import subprocess
from pathlib import Path

import pytest
from fresh import run_bare

import meanflow_kernels

ROOT = Path(__file__).parents[2]
BENCHES = sorted(ROOT.glob("benchmarks/bench_*.py"))
COLUMNS = "op shape dtype variant call ms ms_20 ms_80 flops bytes tflops gbps share_of_ceiling error commit".split()


# on a CPU the others of a head width are as large
ONCE = "not N1024 and not B/4 and not B/2"


def _run(*arguments: str) -> subprocess.CompletedProcess:
    """On a machine of a GPU's kind, where little is installed."""
    options = ["-p", "no:cacheprovider", "--device", "cpu", "--benchmark-quiet", *arguments]
    return run_bare(f"import pytest; sys.exit(pytest.main({options!r}))")


def test_every_operator_has_a_bench_of_its_name():
    ops = {name for name in meanflow_kernels.__all__ if name + "_jvp" in meanflow_kernels.__all__}
    # a packed projection's kernels are attention's
    assert ops and {path.stem.removeprefix("bench_") for path in BENCHES} == ops - {"attention_qkv"}


def test_benches_run_on_a_cpu_and_say_so(tmp_path):
    rows = tmp_path / "rows.jsonl"
    # compiling takes too long for this test
    which = f"not compiled and {ONCE}"
    run = _run(*map(str, BENCHES), "--rows", str(rows), "-k", which, "--commit", "abc", "-rs")
    assert run.returncode == 0, run.stdout[-3000:]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["op"] for row in found} == {path.stem.removeprefix("bench_") for path in BENCHES}
    for row in found:
        assert not [column for column in COLUMNS if column not in row], row
        assert row["device"] == "cpu" and row["gpu"] is None and row["commit"] == "abc"
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert "share_of_peak" not in row
    (dual,) = (r for r in found if (r["op"], r["variant"]) == ("attention", "ours") and "hd72 " in r["shape"])
    assert dual["flops"] == 12 * dual["batch"] * dual["heads"] * dual["tokens"] ** 2 * 72
    assert "no measure of a GPU" in run.stdout
    for peer in ("jvp_flash_attention", "xformers"):
        assert f"{peer} is not installed" in run.stdout


@pytest.mark.slow
def test_compiled_variants_run_on_a_cpu():
    run = _run(*map(str, BENCHES), "-k", f"compiled and {ONCE}")
    assert run.returncode == 0, run.stdout[-3000:]
