"""benchmarks.compare: what counts as slower, and what is not compared at all. All rows here are made up."""

import json

import pytest

from benchmarks import compare

GPU = {"device": "cuda", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "commit": "a1"}
STEP = {
    "kind": "step", "model": "XL/2", "batch": 32, "tokens": 256, "precision": "bf16", "omega": 1.0, "kappa": 0.5,
    "interval": [0.0, 1.0], "share": 0.25, "variant": "ours", "images_per_second": 1.0, "gradient_against": "naive",
}  # fmt: skip
KERNEL = {
    "kind": "kernel", "op": "adaln", "shape": "XL/2 32x256x16x72", "dtype": "bfloat16", "variant": "ours", "flops": 0,
    "bytes": 1, "bound": "copy", "ceiling": 4000.0, "flush": "write",
}  # fmt: skip


def took(row: dict, ms: float, **columns) -> dict:
    return row | GPU | {"ms": ms, "ms_20": 0.98 * ms, "ms_80": 1.02 * ms, "date": "2030-01-01"} | columns


@pytest.fixture
def run(tmp_path, capsys):
    def run(base: list[dict], new: list[dict], *options: str) -> tuple[int, str]:
        for name, rows in (("base", base), ("new", new)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = compare.main([str(tmp_path / "base"), str(tmp_path / "new"), *options])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("row", [STEP, KERNEL], ids=["step", "kernel"])
def test_slower_same_and_faster(run, row):
    base = [took(row, 100.0)]
    # quantiles are 2 % apart on both sides: 0.98 * 108 / 102 is 1.038, and 0.98 * 107 / 102 is 1.028
    for ms, code, word in ((108.0, 1, "SLOWER"), (107.0, 0, "same"), (100.0, 0, "same"), (90.0, 0, "faster")):
        assert run(base, [took(row, ms, commit="b2")])[0] == code, ms
        assert word in run(base, [took(row, ms, commit="b2")])[1], ms
    assert run(base, [took(row, 107.0)], "--tolerance", "0.02")[0] == 1
    assert run(base, [took(row, 150.0)], "--tolerance", "0.5")[0] == 0


def test_pairs_of_steps_see_what_medians_hide(run):
    # sizes differ from step to step by more than the two versions do
    base, new = [100.0, 150.0, 200.0, 250.0], [105.0, 158.0, 210.0, 262.0]
    wide = {"ms_20": 100.0, "ms_80": 250.0}
    assert run([took(STEP, 175.0, **wide)], [took(STEP, 184.0, **wide)])[0] == 0
    code, out = run([took(STEP, 175.0, step_ms=base, **wide)], [took(STEP, 184.0, step_ms=new, **wide)])
    assert code == 1 and "1.050 (1.049 to 1.051)" in out


def test_what_is_not_compared(run):
    base = [took(KERNEL, 1.0), took(STEP, 1.0), took(STEP, 1.0, variant="naive")]
    new = [took(KERNEL, 9.0, flush="write, read"), took(STEP, 9.0, gpu="NVIDIA H100 80GB HBM3")]
    new.append(took(STEP, 9.0, kappa=0.0))
    code, out = run(base, new)
    assert code == 0 and "SLOWER" not in out
    assert "other flush, write and write, read: kernel adaln" in out
    assert "other card, NVIDIA H200 and NVIDIA H100 80GB HBM3: step XL/2 batch 32" in out
    assert "new: step XL/2 batch 32 bf16 omega 1 kappa 0 [0.0, 1.0] r != t 25% ours" in out
    assert "gone: step" in out and out.count("gone") == 1 and "naive" in out.partition("gone")[2]


def test_a_lost_time_fails(run):
    lost = STEP | GPU | {"ms": None, "missing": {"ms": "out of memory"}}
    code, out = run([took(STEP, 1.0)], [lost])
    assert code == 1 and "LOST its time (out of memory)" in out
    assert run([lost], [took(STEP, 1.0)])[0] == 0


def test_the_newest_row_counts(run):
    old, new = took(STEP, 500.0, date="2030-01-01"), took(STEP, 100.0, date="2030-01-02")
    assert run([took(STEP, 100.0)], [new, old])[0] == 0
    assert run([took(STEP, 100.0)], [new | {"date": "2029-01-01"}, old])[0] == 1


def test_gradients_that_were_not_compared_are_marked(run):
    unsure = took(STEP, 100.0, gradient_against=None)
    assert "1.000 (0.961 to 1.041) †" in run([unsure], [took(STEP, 100.0)])[1]
    assert "Timed without a compared gradient: ours" in run([took(STEP, 100.0)], [unsure])[1]
    assert "†" not in run([took(STEP, 100.0)], [took(STEP, 100.0)])[1]


def test_wrong_arguments(capsys, tmp_path):
    assert compare.main([str(tmp_path), str(tmp_path / "nothing")]) == 2
    assert "nothing, which is not there" in capsys.readouterr().err
