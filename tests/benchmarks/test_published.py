"""What the READMEs say of GPUs is what the committed rows say, recomputed here by hand."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import published
from benchmarks.recipes import RECIPES

ROOT = Path(__file__).parents[2]
README, METHOD = (ROOT / "README.md").read_text(), (ROOT / "meanflow" / "README.md").read_text()
STEPS = [
    row
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.jsonl"))
    for row in map(json.loads, path.read_text().splitlines())
    if row.get("kind") == "step" and row.get("gpu") and row.get("ms")
]
GUIDED = {"omega": 1.0, "kappa": 0.5, "interval": [0.0, 1.0], "share": 0.25, "precision": "bf16"}


def block(name: str, text: str = README) -> str:
    return text.split(f"<!-- {name}: ")[1].split(f"<!-- end of {name} -->")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text, without the line below the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    lines = [[[c.strip() for c in line.strip("|").split(" | ")] for line in each.splitlines()] for each in found]
    return [[each[0], *each[2:]] for each in lines]


def newest(card: str, variant: str, **columns) -> dict:
    found = [row for row in STEPS if row["variant"] == variant and card in row["gpu"]]
    found = [row for row in found if all(row[name] == value for name, value in columns.items())]
    return max(found, key=lambda row: row["date"])


def cards() -> list[tuple[str, list[list[str]], str]]:
    """Each card with a table at the top, the table, and what stands around it."""
    text = re.sub(r"\n  (?=\S)", " ", block("headline"))  # the lines of an item as one
    parts = re.split(r"^(?=NVIDIA )", text, flags=re.MULTILINE)[1:]
    return [(re.match(r"(NVIDIA [^,]+),", part)[1], tables(part)[0], part) for part in parts]


def variant_of(cell: str) -> str:
    named = re.search(r"\(`(.+)`\)", cell)
    return named[1] if named else cell.split()[0]


def significant(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def test_the_table_at_the_top():
    compared = []
    for card, (header, *lines), _ in cards():
        assert header == ["training step", "ms", "images/s", "peak, GiB", "MFU"]
        shown = {}
        for name, *cells in lines:
            if title := re.match(r"\*\*(.+), batch (\d+)\*\*", name):
                model, batch = title[1], int(title[2])
                continue
            if cells[0] == "not measured":
                continue
            variant = variant_of(name)
            row = newest(card, variant, model=model, batch=batch, **GUIDED)
            rate = 1e3 * batch / row["ms"]
            mfu = row["needed_flops"] / (row["ms"] / 1e3) / 989e12
            wanted = [significant(row["ms"], 4), significant(rate, 4), significant(row["peak_bytes"] / 2**30, 3)]
            assert cells == [*wanted, f"{mfu:.1%}"], (card, model, variant)
            shown.setdefault(model, []).append(variant)
        compared.append(set(shown["XL/2"]) & set(shown["B/4"]))
    assert any({"zhuyu-cs/MeanFlow", "naive", "naive-compiled", "ours-captured"} <= both for both in compared)


def ratio(row: dict, base: dict) -> float:
    """Of pairs of steps where both have them, of medians where not."""
    pairs = list(zip(base.get("step_ms", []), row.get("step_ms", []), strict=False))
    if pairs and base["commit"] == row["commit"]:
        values = sorted(a / b for a, b in pairs)
        middle = len(values) // 2
        return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    return row["times"][base["variant"]]["50"] if base["variant"] in row["times"] else base["ms"] / row["ms"]


def test_the_speeds_below_it():
    for card, _, text in cards():
        said = re.findall(r"^- (\S+): (\S+) is (.+)\.$", text, re.MULTILINE)
        assert [model for model, *_ in said] == ["XL/2", "B/4"]
        for model, variant, words in said:
            batch = {"XL/2": 32, "B/4": 256}[model]
            row = newest(card, variant, model=model, batch=batch, **GUIDED)
            for part in words.split(", "):
                value, mark, base = re.fullmatch(r"([\d.]+)( †)? times as fast as (\S+)", part).groups()
                other = newest(card, base, model=model, batch=batch, **GUIDED)
                assert float(value) == pytest.approx(ratio(row, other), abs=0.006)
                # a peer's gradient is nobody's; naive's is the one that others are compared with
                sure = row["gradient_against"] and (base.startswith("naive"))
                assert (mark is None) == bool(sure), (model, base)


def test_the_first_sentence():
    """The fastest step of XL/2, and how it compares with compiled torch.func.jvp."""
    said = " ".join(README.partition("![")[0].split())
    ms, card, times = re.search(
        r"takes (\d+) ms on one (\w+), ([\d.]+) times as fast as `torch.func.jvp`", said
    ).groups()
    ours, compiled = (
        newest(card, variant, model="XL/2", batch=32, **GUIDED) for variant in ("ours-captured", "naive-compiled")
    )
    assert ms == f"{ours['ms']:.0f}" and times == f"{ratio(ours, compiled):.1f}"
    assert ours["gradient_against"]


def test_the_derivative_below_it():
    for card, _, text in cards():
        if found := re.search(r"adds ([\d.]+)%(?: †)? to a step \(([\d.]+) ms against ([\d.]+)\)", text):
            rows = [
                newest(card, "ours-captured", model="XL/2", batch=32, **GUIDED | {"kappa": 0.0, "share": share})
                for share in (0.25, 0.0)
            ]
            with_it, without = (row["ms"] for row in rows)
            assert float(found[1]) == pytest.approx(100 * (with_it / without - 1), abs=0.051)
            assert (float(found[2]), float(found[3])) == (round(with_it, 1), round(without, 1))


def test_hours_from_measured_steps():
    (header, *lines), *_ = tables(block("recipes", METHOD))
    place = header.index("hours, from a measured step")
    found = {line[0].strip("`"): line[place] for line in lines}
    measured = {row["preset"] for row in STEPS if row["preset"]}
    assert {name for name, cell in found.items() if cell != "-"} == measured and list(found) == RECIPES
    steps = {"imagenet-b4": 80 * 5004, "imagenet-xl2-plus": 1000 * 5004}
    pattern = r"([\d.]+)(?: to ([\d.]+))? on (\d+) (.+) \((\S+), ([\d.]+) ms for (\d+)\)"
    for name in measured:
        low, high, gpus, card, variant, ms, batch = re.fullmatch(pattern, found[name]).groups()
        row = newest(card, variant, preset=name, batch=int(batch))
        assert int(gpus) * int(batch) == 256 and float(ms) == round(row["ms"], 1)
        hours = steps.get(name, 240 * 5004) * row["ms"] / 3.6e6
        assert float(low) == pytest.approx(hours, abs=0.051)
        # one GPU exchanges no gradients
        assert high is None if gpus == "1" else float(high) > float(low)


def test_steps_of_several_gpus():
    (header, *lines), *_ = tables(block("several GPUs", (ROOT / "benchmarks" / "README.md").read_text()))
    assert header[:5] == ["recipe", "GPUs", "samples a GPU", "measured", "ddp: GB sent, ms a step *, hours *"]
    assert {(line[0].strip("`"), line[1]) for line in lines} == {
        (row["preset"], f"8 {card}") for row in STEPS if row["preset"] for card in ("H100", "H200")
    }
    epochs, millions = {"imagenet-b4": 80}, {"b4": 131, "b2": 131, "m2": 308, "l2": 459, "xl2": 676}
    of_xl2 = {}
    for name, gpus, samples, measured, *engines, efficiency in lines:
        name = name.strip("`")
        ms, batch = re.fullmatch(r"([\d.]+) ms for (\d+), H200", measured).groups()
        row = newest("H200", "ours-captured", preset=name, batch=int(batch))
        assert samples == "32" and float(ms) == round(row["ms"], 1)
        for engine, cell in zip(("ddp", "zero1", "fsdp"), engines, strict=True):
            sent, shortest, longest, *hours = map(float, re.findall(r"[\d.]+", cell))
            for step, each in zip((shortest, longest), hours, strict=True):
                assert each == pytest.approx(epochs.get(name, 240) * 5004 * step / 3.6e6, abs=0.08)
            if engine == "ddp":
                # fp32 gradients, 7/8 of them twice, and as long as 450 GB/s take, all of it hidden or none
                assert sent == pytest.approx(14 / 8 * 4e-3 * millions[name.removeprefix("imagenet-")], rel=0.01)
                assert longest - shortest <= sent / 0.45 + 0.11
                alone = 32 * row["ms"] / row["batch"]
                if gpus == "8 H200":
                    for share, step in zip(re.findall(r"\d+", efficiency), (longest, shortest), strict=True):
                        # both are rounded
                        assert alone / (step + 0.05) - 0.005 <= float(share) / 100 <= alone / (step - 0.05) + 0.005
            if (name, gpus) == ("imagenet-xl2", "8 H200"):
                of_xl2[engine] = hours
    said = re.search(r"`imagenet-xl2` on 8 H200 in (.+?) hours", " ".join(README.split()))[1]
    found = {engine: [float(low), float(high)] for low, high, engine in re.findall(r"(\d+) to (\d+) \((\w+)\)", said)}
    assert found == {engine: pytest.approx(hours, abs=0.56) for engine, hours in of_xl2.items()}


def test_rows_of_a_later_commit_take_their_place():
    later = {"commit": "abc1234", "date": "2030-01-01T00:00:00", "gradient_against": "ours-eager", "times": {}}
    row = newest("H200", "ours-captured", model="XL/2", batch=32, **GUIDED)
    text = published.headline([*STEPS, row | later | {"ms": 50.0, "mfu": 0.5, "images_per_second": 640.0}])
    lines = {line.split(" |")[0]: line for line in text.splitlines() if line.startswith("| ")}
    gib = f"{row['peak_bytes'] / 2**30:.1f}"
    assert lines["| ours, compiled and captured (`ours-captured`)"].endswith(f"| 50.00 | 640.0 | {gib} | 50.0% |")
    assert any(line.endswith("(`naive`), at 0ceb693") for line in lines)
    speed = newest("H200", "naive", model="XL/2", batch=32, **GUIDED)["ms"] / 50.0
    assert f"{speed:.2f} times as fast as naive," in text and re.search("0ceb693 and .*abc1234", text)


def test_nothing_else_is_a_figure_of_a_gpu():
    """Beyond the blocks the READMEs have no TFLOP/s, GiB or MFU of a GPU; benchmarks/results has, beside its rows."""
    texts = {path: path.read_text() for path in ROOT.glob("*/README.md")}
    texts[ROOT / "README.md"] = README.replace(block("headline"), "")
    texts[ROOT / "meanflow" / "README.md"] = METHOD.replace(block("recipes", METHOD), "")
    for path, text in texts.items():
        for line in text.splitlines():
            assert not re.search(r"\d+(\.\d+)? ?(TFLOP/s|GiB)|\bMFU of \d", line), (path, line)


def test_blocks_are_filled_and_asked_for(monkeypatch):
    text = "a\n<!-- x: python -m benchmarks.published -->\nold\n<!-- end of x -->\nb"
    assert published.filled(text, {"x": r"new \1"}).split("\n\n")[1] == r"new \1"
    assert published.filled(published.filled(text, {"x": "1"}), {"x": "1"}) == published.filled(text, {"x": "1"})
    with pytest.raises(ValueError, match="got no block 'y'"):
        published.filled(text, {"y": ""})
