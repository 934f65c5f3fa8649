"""benchmarks.report: what it prints is what the rows say, recomputed here by hand, and it opens offline.

All rows here are made up.
"""

import html
import json
import re

import pytest
from report_rows import CPU, Reader, kernel, made_up, step

from benchmarks import report
from benchmarks.harness import rows
from benchmarks.pages import ratios


def save(path, found: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def build(out, found: list[dict]) -> tuple[Reader, str]:
    source = save(out / "rows.jsonl", found)
    assert report.main([str(source), "--out", str(out)]) == 0
    text = (out / "report.html").read_text()
    return Reader(text), text


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return *build(out, made_up()), out


def test_one_file_that_opens_offline(page):
    reader, text, out = page
    assert reader.addresses and all(address.startswith("#") for address in reader.addresses)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert reader.tags.count("svg") == len(list(out.glob("*.svg"))) == len(list(out.glob("*.png"))) > 10


def test_every_section_has_its_rows(page):
    reader, text, _ = page
    assert set(reader.sections) == {*report.SECTIONS, "parts", "environment"}
    assert all(tables for tables in reader.sections.values())
    assert "No rows" not in text


def test_the_tuner_shows_the_fastest_config(page):
    _, text, _ = page
    section = html.unescape(text.partition('id="tune"')[2].partition("</section>")[0])
    assert '<td class="words">new</td>' in section and '<td class="words">old</td>' in section
    assert "worse" not in section and "3 of 4" in section
    assert (
        "f/config.py, FORWARD should read Config(new): 2.00 times as fast over 1 shapes, 2.00 at the least." in section
    )
    assert "Not timed: spills: [8]: f big." in section


def test_speeds(page):
    reader, _, _ = page
    pairs = {"variant": "ours", "ms a step": "125.0"}
    assert reader.cell("headline", "times as fast as naive", **pairs) == "3.25 (3.00 to 3.50)"
    assert reader.cell("headline", "times as fast as naive-compiled", **pairs) == "1.60 (1.50 to 1.70)"
    assert reader.cell("headline", "20 to 80 %, ms", **pairs) == "112.5 to 156.2"
    assert reader.cell("headline", "images/s", **pairs) == "256.0"
    # without pairs the ratio of the medians, of the same step on the same machine alone
    assert reader.cell("headline", "times as fast as naive", variant="ours-captured") == "4.00"
    assert reader.cell("headline", "times as fast as naive-compiled", variant="ours-captured") == "2.00"
    assert reader.cell("headline", "times as fast as naive", variant="ours", **{"ms a step": "30.00"}) == "3.00"
    assert reader.cell("headline", "times as fast as naive", variant="ours-eager") == "1.60"
    assert reader.cell("headline", "MFU", variant="naive", **{"ms a step": "400.0"}) == "12%"


def test_ablation(page):
    reader, text, _ = page
    ours = {"variant": "ours-no-kernels"}
    # in the order of the variants, whatever was known first
    assert [line[0] for line in reader.sections["ablation"][0][1:]] == ["ours", "ours-no-kernels", "ours-eager"]
    # half as fast is twice the time
    assert reader.cell("ablation", "time over ours", **ours) == "2.00 (1.25 to 2.50)"
    assert reader.cell("ablation", "peak, GiB", **ours) == "30.00"
    assert reader.cell("ablation", "left out", **ours) == "the fused operators: their plain torch reference"
    assert reader.cell("ablation", "left out", variant="ours") == "nothing"
    assert reader.cell("ablation", "ms a step", variant="ours-eager") == "not timed"
    assert reader.cell("ablation", "left out", variant="ours-eager") == "torch.compile; not timed: out of memory"
    # its base is no second "ours" among the variants, and keeps the pairs there
    assert reader.cell("headline", "ms a step", variant="ours", **{"images/s": "256.0"}) == "125.0"
    assert not any("ours-no-kernels" in line for table in reader.sections["headline"] for line in table)
    assert "naive was not timed: no such driver." in text


def test_agreement(page):
    reader, _, _ = page
    found = reader.sections["agreement"][0]
    head, *lines = found
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert [row["1 within the spread"] for row in rows] == ["yes", "NO", "–"]
    assert rows[0]["time over the other's"] == "1.004 (0.990 to 1.020)" and rows[0]["the other's, ms"] == "124.0"
    assert rows[0]["against"] == "the same version a second time" and rows[2]["against"] == "revision main"


def test_kernel_rates_are_work_over_time(page):
    reader, text, _ = page
    ours = {"variant": "ours", "ms": "0.5000"}
    assert reader.cell("kernels", "TFLOP/s", **ours) == "400.0"  # 2e11 / 0.5 ms
    assert reader.cell("kernels", "of the measured ceiling", **ours) == "50%"
    assert reader.cell("kernels", "FLOP/byte", **ours) == "200"
    slow = {"variant": "sdpa math, func.jvp"}
    assert reader.cell("kernels", "TFLOP/s", **slow) == "50.00"
    assert reader.cell("kernels", "of the measured ceiling", **slow) == "6.2%"
    assert reader.cell("kernels", "ms over ours", **slow) == "8.00"
    bound = {"variant": "func.jvp, compiled"}
    assert reader.cell("kernels", "GB/s", **bound) == "1,000"  # 3e8 / 0.3 ms
    assert reader.cell("kernels", "of the measured ceiling", **bound) == "25%"
    # a column that nothing fills is left out
    assert all("FLOP/byte" not in table[0] for table in reader.sections["kernels"] if "GB/s" in table[0])
    assert "a copy's 4,000 GB/s and a product's 800.0 TFLOP/s" in html.unescape(text)


def test_other_numbers(page):
    reader, text, _ = page
    assert reader.cell("memory", "peak, GiB", variant="ours") == "20.00"
    assert reader.cell("memory", "of naive's peak", variant="ours") == "0.50"
    assert reader.cell("breakdown", "all, ms", **{"by part": "ours"}) == "120.0"
    assert reader.cell("breakdown", "backward, ms (share)", **{"by part": "ours"}) == "60.0 (50%)"
    assert reader.cell("breakdown", "tangent, ms (share)", **{"by part": "ours"}) == "-1.00 (-1%)"
    assert reader.cell("breakdown", "GEMM, ms (share)", **{"by kind": "naive"}) == "200 (50%)"
    assert reader.cell("scaling", "ms a sample", batch="16", variant="naive") == "4.000"
    assert reader.cell("scaling", "ms a step", tokens="4096", variant="ours") == "1,024"
    assert reader.cell("scaling", "ms a step", tokens="16384") == "out of memory"
    assert reader.cell("optimizer", "GB/s", implementation="native") == "3,000"
    assert reader.cell("optimizer", "of the measured copy", implementation="native") == "75%"
    assert reader.cell("optimizer", "times as fast as torch", implementation="native") == "1.50 (1.40 to 1.60)"
    assert reader.cell("accounting", "step, F", recipe="imagenet-b4") == "3.875"  # (1.25 + 2 + 0.5 + 4) / 2
    assert reader.cell("accounting", "guidance, F", recipe="imagenet-b4") == "0.625"
    assert reader.cell("projection", "GPU-hours (projection)", recipe="imagenet-xl2") == "9,872"  # 8 GPUs
    assert "Trace with named ranges, beside this report: step-xl2.json" in text
    assert "RuntimeError: &lt;out of luck&gt;" in text and "Missing: joules_per_image (no permission)." in text


def test_inference(page):
    reader, text, _ = page
    assert reader.cell("inference", "images/s", network="compiled") == "1,280"  # 64 in 50 ms
    assert reader.cell("inference", "times as fast as the first", decode="plain", steps="–") == "1.50 (1.00 to 2.00)"
    assert reader.cell("inference", "decode's share", sample="compiled") == "75%"
    assert reader.cell("inference", "off the first's output", network="eager") == "1.3e-03"
    assert "decode tiling was not timed: no larger than a tile." in text
    # a bar of 40 ms of network and 120 ms of decoding
    assert re.search(r">120</text>", text) and "A one-step sample: XL/2, batch 64, latents of 32" in text


def test_no_number_without_hardware(page):
    reader, text, out = page
    measured = [c for c in reader.captions if "NVIDIA H200" in c or "CPU (made-up, 2 threads)" in c]
    others = [c for c in reader.captions if c not in measured]
    # counts are the same everywhere, projections and the last two tables name the hardware in each line
    assert [c for c in others if c] == [c for c in others if "Counted" in c or "Projection" in c]
    line = "NVIDIA H200, driver 580.1, SM 1980 MHz, memory 3201 MHz, torch 2.11.0, triton 3.6.0, commit 0123456789ab, "
    assert line + "2030-01-02" in measured
    assert '<span class="badge">CPU</span>' in text and '<span class="badge">projection</span>' in text
    for path in out.glob("*.svg"):
        words = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()))
        assert "NVIDIA H200, driver" in words or "CPU (made-up" in words, path
        assert path.name.startswith("projection") == ("PROJECTION" in words)


def test_a_throttled_gpu_says_so(tmp_path):
    found = [step("ours", 9.0, throttle_bits=0x4 | 0x1, sm_mhz=1200), step("naive", 9.0, sm_mhz=1980)]
    _, text = build(tmp_path, found)
    assert "SM 1200 to 1980 MHz, memory 3201 MHz, throttled in 1 of 2 rows (software power cap)" in text


def test_no_rows_say_what_makes_them(tmp_path):
    _, text = build(tmp_path, [step("ours", 9.0, CPU)])
    others = [section for name, section in report.SECTIONS.items() if name != "headline"]
    assert all(f"{s.title}: made by <code>{s.command}</code>" in text for s in others if s.command)
    assert text.count(": made by") == sum(section.command is not None for section in others)


def test_the_newest_of_several_rows_is_shown(tmp_path):
    found = [step("ours", 9.0, date="2030-01-04T00:00:00"), step("ours", 7.0, date="2030-01-03T00:00:00")]
    reader, text = build(tmp_path, found)
    assert reader.cell("headline", "ms a step", variant="ours") == "9.000"
    assert "1 older rows of the same names are not shown." in text


def test_other_commits_and_machines_do_not_mix(tmp_path):
    found = [step("naive", 9.0, commit="a" * 40), step("ours", 3.0), step("ours", 4.0, CPU)]
    reader, _ = build(tmp_path, found)
    tables = reader.sections["headline"]
    assert len(tables) == 3 and all(len(table) == 2 for table in tables)
    assert not any("1.33" in cell or "3.00 (" in cell for table in tables for cell in table[1])


def test_unknown_and_incomplete_rows_are_counted(tmp_path, capsys):
    broken = step("ours", 9.0)
    del broken["ms"]
    _, text = build(tmp_path, [step("ours", 9.0), {"kind": "weather"}, {"x": 1}, broken])
    words = "2 rows are of an unknown kind"
    assert words in text and words in capsys.readouterr().out
    assert "line 4: a row of kind step lacks ms" in text


def test_a_broken_line_is_named(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(step("ours", 9.0)) + "\n\n" + '{"op": "att\n')
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f'{path}, line 3: got \'{{"op": "att\'' in error
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_not_there(tmp_path, capsys):
    assert report.main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "nothing, which is not there" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [k for k in rows.REQUIRED if k != "part"])
def test_kinds_are_inferred(kind):
    found = [
        row for row in map(rows.flat, made_up()) if rows.kind_of({k: v for k, v in row.items() if k != "kind"}) == kind
    ]
    assert found and all(row.get("kind", kind) == kind for row in found)


def test_pairs_of_steps_of_two_processes(tmp_path):
    one, other = [100.0, 200.0, 150.0, 120.0, 400.0], [50.0, 80.0, 100.0, 60.0, 100.0]
    found = [step("naive", 150.0, step_ms=one), step("ours", 80.0, step_ms=other), step("ours-eager", 75.0)]
    reader, _ = build(tmp_path, found)
    # 2, 2.5, 1.5, 2 and 4, and not 150 / 80
    assert reader.cell("headline", "times as fast as naive", variant="ours") == "2.00 (1.90 to 2.80)"
    assert reader.cell("headline", "times as fast as naive", variant="ours-eager") == "2.00"
    assert reader.cell("headline", "times as fast as naive", variant="naive") == "1.00"


@pytest.mark.parametrize("elsewhere", [{"commit": "a" * 40}, {"gpu": "NVIDIA H100 80GB HBM3"}, {"kappa": 0.0}])
def test_no_pairs_across_commits_cards_and_steps(elsewhere):
    one, other = step("naive", 3.0, step_ms=[1.0, 2.0, 3.0]), step("ours", 1.0, step_ms=[1.0, 1.0, 1.0])
    assert ratios.paired(other, one) == [1.0, 2.0, 3.0]
    assert ratios.paired(other | elsewhere, one) == []


def test_pairs_in_the_ablation(tmp_path):
    compared = ["ours", "ours-no-kernels"]
    found = [step("ours", 1.0, compared=compared, step_ms=[1.0, 2.0, 4.0])]
    found += [step("ours-no-kernels", 3.0, compared=compared, step_ms=[3.0, 6.0, 12.0])]
    reader, _ = build(tmp_path, found)
    assert reader.cell("ablation", "time over ours", variant="ours-no-kernels") == "3.00 (3.00 to 3.00)"


def test_an_ablation_of_processes_of_their_own(tmp_path):
    found = [step(name, ms, compared=[name]) for name, ms in (("ours-no-kernels", 3.0), ("ours-eager", 4.0))]
    found += [
        step("ours", 2.0, compared=["ours-captured", "ours"], step_ms=[2.0, 2.0, 2.0]),
        step("ours", 9.0, batch=8),
    ]
    found += [step("ours-eager-whole-batch", 5.0, compared=["ours-eager-whole-batch"])]
    reader, _ = build(tmp_path, found)
    compiled, eager = reader.sections["ablation"]
    assert [line[0] for line in compiled[1:]] == ["ours", "ours-no-kernels", "ours-eager"]
    assert reader.cell("ablation", "time over ours", variant="ours-no-kernels") == "1.50"
    assert [line[0] for line in eager[1:]] == ["ours-eager", "ours-eager-whole-batch"]
    assert reader.cell("ablation", "time over ours-eager", variant="ours-eager-whole-batch") == "1.25"
    # without such steps there is no ablation of ours alone
    assert "ablation" not in build(tmp_path, found[2:4])[0].sections


def test_a_gradient_that_was_not_compared_is_marked(tmp_path):
    # nobody compared with ours, for what came after it failed; naive was compared with
    found = [step("naive", 300.0), step("naive-compiled", 150.0), step("ours", 100.0, gradient_against=None)]
    found.append(step("theirs", 600.0, gradient_against=None, peer="they/theirs", peer_commit="abc", note="as it is"))
    reader, text = build(tmp_path, found)
    speeds = [reader.cell("headline", "times as fast as naive", variant=name) for name in ("naive-compiled", "ours")]
    assert speeds == ["2.00", "3.00 †"]
    assert reader.cell("headline", "times as fast as theirs", variant="naive") == "2.00 †"
    assert reader.cell("headline", "times as fast as naive-compiled", variant="naive") == "0.50"
    assert "† Timed without a compared gradient: theirs (another program), ours." in text
    assert "3.00 x naive †" in text and "theirs (commit abc): as it is." in text
    # once a run has compared, the mark is gone
    reader, text = build(tmp_path, [*found[:2], found[2] | {"gradient_against": "naive"}])
    assert "†" not in text
    reader, text = build(tmp_path, [*found[:3], step("ours-captured", 90.0, gradient_against="ours")])
    assert "†" not in text


def test_public_kernels_are_beside_ours(page):
    reader, text, _ = page
    assert reader.cell("public", "TFLOP/s", variant="theirs") == "500.0"
    assert reader.cell("public", "ms over our fastest", variant="theirs") == "0.50"
    assert "theirs: they/theirs (revision not recorded)" in text
    # among our own benches there is no second "ours", and no kernel without a ceiling
    assert reader.cell("kernels", "ms", variant="ours", **{"TFLOP/s": "400.0"}) == "0.5000"
    assert not any("theirs" in line for table in reader.sections["kernels"] for line in table)
    assert reader.cell("products", "forward, TFLOP/s", layer="fc1") == "700.0"


def test_flush_is_said(tmp_path):
    _, text = build(tmp_path, [kernel("adaln", "ours", 0.1, flops=0, moved=3e8) | {"flush": "write"}])
    assert "flushed by writing" in text


@pytest.mark.parametrize("name", ["cpu", pytest.param("h200", marks=pytest.mark.slow)])
def test_committed_rows_make_a_report(tmp_path, name):
    folder = rows.Path(report.__file__).parent / "results" / name
    assert report.main([str(folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert 'id="headline"' in text and 'id="kernels"' in text and "lacks" not in text
