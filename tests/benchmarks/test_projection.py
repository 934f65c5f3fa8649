"""Projections from measured steps, recomputed by hand: a recipe's hours, and its step on several GPUs by engine."""

import json

import pytest

from benchmarks import projection
from benchmarks.counting import exchange
from benchmarks.counting.accounts import MetaStep
from benchmarks.counting.exchange import Links
from benchmarks.counting.floor import Rate
from meanflow.presets import preset

H100, H200 = projection.CARDS["H100"], projection.CARDS["H200"]
ROW = {"kind": "step", "preset": "imagenet-xl2", "variant": "ours", "batch": 32, "ms": 90.0, "gpu": H200}
ROW |= {"model": "XL/2", "precision": "bf16", "ms_20": 89.0, "ms_80": 91.0, "images_per_second": 356.0}
ROW |= {"needed_flops": 30e12}
STEPS = 240 * 5004
# of XL/2; all but some 1.5 million have a bf16 copy
PARAMETERS = 676.4e6
# at 4 TB/s, ms: 12 + 2 bytes read, 12 + 2 written, 8 of the average, and the norm's 2
ALONE = 38 * PARAMETERS / 4e12 * 1e3
# what 32 samples take at most of 90 ms beside it; of 30 TFLOP the backward has twice the forward's, 237 GFLOP a sample
PASSES = 90 - ALONE
BACKWARD = PASSES * 32 * 2 * 237e9 / 30e12


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rates(monkeypatch):
    """1,000 TFLOP/s of products, 4 TB/s of copies."""
    found = Rate(1000.0, "measured"), Rate(4000.0, "measured")
    monkeypatch.setattr(projection, "find_rates", lambda gpu: found)


def scaled(gpus, engine, rows=(ROW,), card=H200, links=Links()):
    (row,) = projection.scale(list(rows), [gpus], [card], [engine], links)[0]
    return row


def test_hours_of_a_recipe(tmp_path, capsys):
    measured, out = tmp_path / "measured.jsonl", tmp_path / "projected.jsonl"
    row = ROW | {"gpu": "a GPU"}
    # one on a CPU, and one of a variant that did not fit
    others = [row | {"gpu": None}, row | {"variant": "ours-captured", "ms": None, "missing": {"ms": "out of memory"}}]
    projection.main([write(measured, row, *others), "--link-gbps", "450", "--rows", str(out)])
    (found,) = rows_of(out)
    # 240 epochs of 5,004 steps; 676 M parameters, 7/4 of whose bytes go through each link
    assert found["gpus"] == 8 and found["steps"] == STEPS
    assert found["hours_hidden"] == pytest.approx(STEPS * 0.09 / 3600)
    assert found["exchange_ms"] == pytest.approx(7 / 4 * 676.4e6 * 4 / 450e9 * 1e3, rel=1e-3)
    assert found["gpu_hours"] == pytest.approx(8 * found["hours"]) and found["hours"] > found["hours_hidden"]
    assert "PROJECTED, not measured" in capsys.readouterr().out
    write(measured, row | {"gpu": None})
    with pytest.raises(SystemExit, match="without a step of a preset on a GPU"):
        projection.main([str(measured)])


def test_steps_of_eight_gpus(rates):
    # the weights' 48 bytes of a number (fp32 gradients cast, summed up and read), or a part of 42 and the cast's 6;
    # sharded whole no copy is written
    sevenths = 7 / 8 * PARAMETERS / 450e6
    for engine, moved, early, late, behind in (
        ("ddp", 48, 2 * 4, 0, BACKWARD),
        ("zero1", 42 / 8 + 6, 4, 2, BACKWARD),
        # two forwards and a backward gather
        ("fsdp", 40 / 8 + 6, 3 * 2 + 4, 0, PASSES),
    ):
        found = scaled(8, engine)
        assert (found["batch"], found["measured_batch"], found["measured_ms"]) == (32, 32, 90.0)
        assert found["exchange_ms"] == pytest.approx((early + late) * sevenths, rel=0.01)
        assert found["sent_bytes"] == pytest.approx((early + late) * 7 / 8 * PARAMETERS, rel=0.01)
        shortest, longest = found["step_ms"]
        update = moved * PARAMETERS / 4e9
        assert longest == pytest.approx(PASSES + update + found["exchange_ms"], rel=1e-3)
        assert shortest == pytest.approx(longest - min(early * sevenths, behind), rel=2e-3)
        assert found["hours_hidden"] == pytest.approx(STEPS * shortest / 3.6e6)
        assert found["hours"] == pytest.approx(STEPS * longest / 3.6e6)
        assert found["efficiency"] == pytest.approx([90 / longest, 90 / shortest])


def test_between_machines_the_network_counts(rates):
    # 8 machines of 8: of each of its parts of an eighth a GPU sends 7 / 8 to the others, twice
    size = 4 * PARAMETERS
    ms = 2 * (7 / 8 * size / 450e6 + size / 8 * 7 / 8 / 50e6)
    found = scaled(64, "ddp")
    assert found["batch"] == 4 and found["exchange_ms"] == pytest.approx(ms, rel=1e-3)
    # more than four samples' backward can hide
    assert found["step_ms"][1] - found["step_ms"][0] == pytest.approx(BACKWARD / 8, rel=0.01)
    assert scaled(64, "ddp", links=Links(network=100.0))["exchange_ms"] < 0.8 * ms


def test_one_gpu_is_the_measured_step(rates):
    row = ROW | {"batch": 256}
    for engine in exchange.ENGINES:
        found = scaled(1, engine, [row])
        assert found["step_ms"] == pytest.approx([90.0, 90.0]) and found["efficiency"] == pytest.approx([1.0, 1.0])
        assert found["exchange_bytes"] == {}


def test_another_card_by_datasheets(rates):
    # the same products, 30 ms of them; the rest in the ratio of the memories
    rest, update = PASSES - 30, 48 * PARAMETERS / 4e9
    found = scaled(8, "ddp", card=H100)
    assert found["step_ms"][1] == pytest.approx(30 + (rest + update) * 4800 / 3350 + found["exchange_ms"], rel=1e-3)
    assert (found["gpu"], found["measured_gpu"]) == (H100, H200)
    # a card's own steps come first
    own = ROW | {"gpu": H100, "ms": 100.0}
    assert scaled(8, "ddp", [ROW, own], card=H100)["measured_ms"] == 100.0


def test_the_nearest_measured_batch(rates):
    rows = [ROW, ROW | {"batch": 128, "ms": 330.0}, ROW | {"batch": 32, "ms": 85.0, "variant": "ours-captured"}]
    for gpus, batch, ms in ((2, 128, 330.0), (8, 32, 85.0), (128, 32, 85.0)):
        found = scaled(gpus, "ddp", rows)
        assert (found["batch"], found["measured_batch"], found["measured_ms"]) == (256 // gpus, batch, ms)


def test_tensors_whose_rows_are_not_divided():
    found = exchange.weights(projection.preset("imagenet-b4"))
    sizes = exchange.exchanged("zero1", found, 8, 1)
    # the labels' 1,001 rows and the last layer's bias of 64 patch numbers, of which 8 divide one
    assert sizes["all-reduce"] == 4 * 1001 * 768
    assert sizes["reduce-scatter"] == 4 * found.numel - sizes["all-reduce"]


def test_what_the_command_says(rates, tmp_path, capsys):
    measured, out = write(tmp_path / "measured.jsonl", ROW), tmp_path / "out.jsonl"
    projection.main([measured, "--gpus", "3,8,12,256", "--card", "H100", "H200", "--rows", str(out)])
    said = capsys.readouterr().out
    assert said.startswith("PROJECTED, not measured") and "Supposed: 450 GB/s" in said
    assert said.count("8 H100") == said.count("8 H200") == 3
    for why in ("got 3, wanted a divisor of the batch 256", "got 12, wanted at most 8, or a multiple of it"):
        assert f"not projected: gpus: {why}" in said
    assert "got 256, wanted at most 128, which leave each 2 samples of the batch 256; take fewer (imagenet-xl2)" in said
    assert [row["parallel"] for row in rows_of(out)] == 2 * ["ddp", "zero1", "fsdp"]
    other = write(tmp_path / "other.jsonl", ROW | {"gpu": "a GPU"})
    with pytest.raises(SystemExit, match="gpu: got 'a GPU', wanted one of"):
        projection.main([other, "--gpus", "8", "--card", "H100"])
    for wrong in (("--gpus", "0"), ("--gpus", "eight"), ("--gpus", "8", "--link-gbps", "0")):
        with pytest.raises(SystemExit):
            projection.main([measured, *wrong])


def test_a_recipe_has_its_own_batch(tmp_path, rates):
    rows = projection.usable([ROW | {"preset": "imf-xl2"}, ROW | {"preset": "imf-xl2", "batch": 512, "ms": 900.0}])
    assert [projection.project(row, 450.0)["gpus"] for row in rows] == [32, 2]
    # the backward is that of both heads, of which a forward to u has one
    forward = MetaStep(preset("imf-xl2")).plain_forward()
    assert projection.counts("imf-xl2")[2] > 1.1 * (2 * forward.linear + 2.5 * forward.attention) / 1024
