"""The report's other sections, each from the rows of one kind: HTML, with the figures written beside it."""

import html
from itertools import compress

from meanflow.training.peaks import PEAKS

from ..harness.rows import by_machine, device_name, hardware, missing, newest, rate, why_untimed
from . import plots
from .markup import (
    GIB,
    NONE,
    Page,
    by_workload,
    figures_of,
    gib,
    grid,
    notes,
    number,
    older,
    percent,
    power,
    spread,
    where,
    workload,
)
from .ratios import speed_words

ON_A_CPU = (
    "On a CPU kinds are of operators: attention is its batched products and softmax (its scaling and row sums stay "
    "pointwise), Python what passes between the operators; the profiler itself adds to all of them."
)


def breakdown(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        pieces.append(where(group))
        group, left_over = newest(group, lambda row: (workload(row), row["variant"], row["by"]))
        figures, lacking = [], []
        for title, found in by_workload(group).items():
            pieces.append(f"<h3>{html.escape(title)}</h3>")
            for by in dict.fromkeys(row["by"] for row in found):
                cut = {row["variant"]: row["ms"] for row in found if row["by"] == by and row["ms"]}
                lacking += [
                    f"{title}: {row['variant']} by {by} was not told apart: {why}."
                    for row in found
                    if row["by"] == by and (why := why_untimed(row))
                ]
                if not cut:
                    continue
                names = list(dict.fromkeys(name for ms in cut.values() for name in ms))
                totals = {variant: sum(ms.values()) for variant, ms in cut.items()}
                lines = [
                    [variant, number(totals[variant])]
                    + [f"{number(ms[n], 3)} ({ms[n] / totals[variant]:.0%})" if n in ms else NONE for n in names]
                    for variant, ms in cut.items()
                ]
                header = [f"=by {by}", "all, ms", *(f"{name}, ms (share)" for name in names)]
                pieces.append(grid(header, lines, hardware(found)))
                figure = plots.stacked(f"Step by {by}: {title}", hardware(found), "ms a step", cut)
                figures.append(page.figure(f"breakdown by {by} {title} {device_name(found[0])}", figure))
        lines = ["A difference of two times can come out below zero."]
        if group[0].get("device") == "cpu":
            lines.append(ON_A_CPU)
        traces = dict.fromkeys(row["trace"] for row in group if row.get("trace"))
        lines += [
            f"Trace with named ranges, beside this report: {name}; opens at https://ui.perfetto.dev." for name in traces
        ]
        pieces.append(notes(lines + lacking + older(left_over) + missing(group)) + figures_of(figures))
    return "".join(pieces)


def memory(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine([row for row in rows if row.get("peak_bytes")]):
        group, left_over = newest(group, lambda row: (workload(row), row["variant"]))
        lines, figures = [], []
        for title, found in by_workload(group).items():
            naive = next((row["peak_bytes"] for row in found if row["variant"] == "naive"), None)
            for row in found:
                ratio = NONE if naive is None else f"{row['peak_bytes'] / naive:.2f}"
                reserved = row["reserved_bytes"] / GIB if row.get("reserved_bytes") else None
                lines.append([title, row["variant"], number(gib(row)), number(reserved), ratio])
            peaks = {row["variant"]: (gib(row),) for row in found}
            words = {name: f"{number(value[0])} GiB" for name, value in peaks.items()}
            if len(found) > 1:
                figure = plots.bars(f"Peak memory: {title}", hardware(found), "GiB allocated at most", peaks, words)
                figures.append(page.figure(f"memory {title} {device_name(found[0])}", figure))
        header = ["=step", "=variant", "peak, GiB", "reserved, GiB", "of naive's peak"]
        pieces.append(where(group) + grid(header, lines, hardware(group)) + notes(older(left_over)))
        pieces.append(figures_of(figures))
    return "".join(pieces)


AXES = {"batch": "batch, samples", "tokens": "tokens", "model": "model"}


def scaling(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        pieces.append(where(group))
        group, left_over = newest(group, lambda row: (workload(row), row["axis"], row["variant"]))
        figures = []
        for axis in dict.fromkeys(row["axis"] for row in group):
            # models of other patches have other tokens
            without = ("model", "tokens") if axis == "model" else (axis,)
            of_axis = [row for row in group if row["axis"] == axis]
            for title, found in by_workload(of_axis, *without).items():
                found = found if axis == "model" else sorted(found, key=lambda row: row[axis])
                pieces.append(f"<h3>Over {axis}: {html.escape(title)}</h3>" + scaling_table(found, axis))
                timed = [row for row in found if row.get("ms")]
                if not timed:
                    continue
                panels: dict[str, dict[str, list]] = {"ms a step (20 to 80 %)": {}}
                for row in timed:
                    point = (row[axis], row["ms"], row["ms_20"], row["ms_80"])
                    panels["ms a step (20 to 80 %)"].setdefault(row["variant"], []).append(point)
                    if peak := gib(row):
                        peaks = panels.setdefault("peak memory, GiB", {})
                        peaks.setdefault(row["variant"], []).append((row[axis], peak))
                figure = plots.curves(f"Step over {axis}: {title}", hardware(found), AXES.get(axis, axis), panels)
                figures.append(page.figure(f"scaling {axis} {title} {device_name(found[0])}", figure))
        pieces.append(figures_of(figures) + notes(older(left_over) + missing(group)))
    return "".join(pieces)


def scaling_table(rows: list[dict], axis: str) -> str:
    lines = []
    for row in rows:
        ms = row.get("ms")
        # a value that did not fit says why it has no time
        why = why_untimed(row) or NONE
        cells = [number(ms), spread(row), number(ms / row["batch"])] if ms else [why, NONE, NONE]
        lines.append([str(row.get(axis)), row["variant"], *cells, number(gib(row))])
    header = [f"={axis}", "=variant", "ms a step", "20 to 80 %, ms", "ms a sample", "peak, GiB"]
    return grid(header, lines, hardware(rows))


# --- kernels ---


DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
FLUSHES = {
    "write": "before each call the L2 cache was flushed by writing: a call pays for writing those lines back, and "
    "small ones reach a smaller share than in the step. Not to be compared with rows of another flush",
    "write, read": "before each call a buffer larger than the L2 cache was written, then another one read",
}


def flush_note(rows: list[dict]) -> list[str]:
    """A line on how the L2 cache was made cold, if the rows say it."""
    return [f"Flush: {FLUSHES.get(name, name)}." for name in dict.fromkeys(r["flush"] for r in rows if r.get("flush"))]


def kernel_table(rows: list[dict], caption: str) -> str:
    lines, units = [], list(dict.fromkeys(rate(row)[1] for row in rows))
    for row in rows:
        value, unit = rate(row)
        same = [r for r in rows if all(r.get(k) == row.get(k) for k in ("shape", "dtype", "call"))]
        ours = next((r["ms"] for r in same if r["variant"].startswith("ours")), None)
        errors = (power(row.get(name)) for name in ("error", "error_dot"))
        lines.append(
            [row["shape"], DTYPES.get(row["dtype"], row["dtype"]), row["variant"], number(row["ms"]), spread(row)]
            + [number(row.get("host_ms"), 3), number(value) if len(units) == 1 else f"{number(value)} {unit}"]
            + [percent(row["ceiling"] and value / row["ceiling"]), percent(row.get("share_of_peak"))]
            + [number(row["flops"] / row["bytes"], 3) if row["flops"] else NONE]
            + [NONE if ours is None else f"{row['ms'] / ours:.2f}", *errors]
        )
    header = ["=shape", "=dtype", "=variant", "ms", "20 to 80 %, ms", "host, ms"]
    header += [units[0] if len(units) == 1 else "rate", "of the measured ceiling"]
    header += ["of the datasheet", "FLOP/byte", "ms over ours", "error", "tangent's error"]
    # a column that no row fills is room lost
    filled = [any(line[place] != NONE for line in lines) for place in range(len(header))]
    lines = [list(compress(line, filled)) for line in lines]
    return grid(list(compress(header, filled)), lines, caption)


def kernels(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (row["op"], row["shape"], row["dtype"], row["variant"]))
        line, name = hardware(group), device_name(group[0])
        copy, gemm = (
            max((r["ceiling"] for r in group if r["bound"] == b and r["ceiling"]), default=None)
            for b in ("copy", "gemm")
        )
        peak, figures = PEAKS.get(group[0].get("gpu")), []
        if products := [row for row in group if row["flops"]]:
            points: dict[str, list[tuple]] = {}
            for row in products:
                point = (row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9, row["op"])
                # what stands behind the comma is the call: the family is enough to tell colours apart
                points.setdefault(row["variant"].split(",")[0], []).append(point)
            title = f"Kernels with matrix products under {ceiling_words(copy, gemm)}"
            figures.append(page.figure(f"roofline {name}", plots.roofline(title, line, points, copy, gemm, peak)))
        if pointwise := [row for row in group if not row["flops"]]:
            reached: dict[str, dict[str, float]] = {}
            for row in pointwise:
                names = reached.setdefault(f"{row['op']} {row['shape'].rsplit(' ', 1)[0]} {row['dtype']}", {})
                names[row["variant"]] = rate(row)[0]
            title = f"Pointwise kernels under {ceiling_words(copy, None)}; compulsory bytes over time"
            figures.append(page.figure(f"bandwidth {name}", plots.dots(title, line, "GB/s", reached, copy)))
        tables = []
        for op in dict.fromkeys(row["op"] for row in group):
            of_op = [row for row in group if row["op"] == op]
            table = kernel_table(of_op, hardware(of_op))
            tables.append(f"<details open><summary><b>{html.escape(op)}</b></summary>{table}</details>")
        lines = [f"Measured ceilings: {ceiling_words(copy, gemm)}. A row's share is of the ceiling of its own run."]
        lines.append(
            "Device time with a cold L2 cache on a GPU, the whole call on a CPU. Errors: relative, against fp64."
        )
        if peak:
            lines.append(f"Datasheet: {peak.tflops:g} TFLOP/s, {peak.gbps:g} GB/s ({peak.source}).")
        lines += flush_note(group) + older(left_over) + missing(group)
        pieces.append(where(group) + figures_of(figures) + notes(lines) + "".join(tables))
    return "".join(pieces)


def ceiling_words(copy: float | None, gemm: float | None) -> str:
    """The measured rates of a copy and of a product in words."""
    words = [f"a copy's {number(copy)} GB/s"] if copy else []
    return " and ".join(words + ([f"a product's {number(gemm)} TFLOP/s"] if gemm else [])) or "no measured ceiling"


# --- the optimizer, counts and projections ---


def optimizer(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(group, lambda row: (row["model"], row["implementation"]))
        lines, figures = [], []
        for model in dict.fromkeys(row["model"] for row in group):
            found = [row for row in group if row["model"] == model]
            words = {}
            for row in found:
                gbps = row["bytes"] / row["ms"] / 1e6
                against = row.get("times_torch")
                against = (against["50"], against["20"], against["80"]) if against else None
                lines.append(
                    [model, f"{row['parameters'] / 1e6:.1f}", row["implementation"], number(row["ms"]), spread(row)]
                    + [number(gbps), percent(gbps / row["copy_gbps"]), speed_words(against)]
                )
                words[row["implementation"]] = f"{number(row['ms'])} ms, {number(gbps)} GB/s"
            bars = {row["implementation"]: (row["ms"], row["ms_20"], row["ms_80"]) for row in found}
            title = f"AdamW with the moving average, {model}, {found[0]['parameters'] / 1e6:.1f} M fp32 parameters"
            figure = plots.bars(title, hardware(found), "ms a step (20 to 80 %)", bars, words)
            figures.append(page.figure(f"optimizer {model} {device_name(found[0])}", figure))
        header = ["=model", "parameters, M", "=implementation", "ms a step", "20 to 80 %, ms", "GB/s"]
        header += ["of the measured copy", "times as fast as torch"]
        pieces.append(where(group) + grid(header, lines, hardware(group)) + notes(older(left_over) + missing(group)))
        pieces.append(figures_of(figures))
    return "".join(pieces)


def inference(page: Page, rows: list[dict]) -> str:
    pieces = []
    for group in by_machine(rows):
        group, left_over = newest(
            group,
            lambda r: (
                r["model"],
                r["batch"],
                r.get("input_size"),
                r["part"],
                r["variant"],
                r["precision"],
                r["steps"],
            ),
        )
        pieces.append(where(group))
        figures, batches = [], {}
        for row in group:
            title = f"{row['model']}, batch {row['batch']}, latents of {row.get('input_size')}"
            batches.setdefault(title, []).append(row)
        for title, found in batches.items():
            pieces.append(f"<h3>{html.escape(title)}</h3>")
            for scope in ("network", "decode", "sample"):
                if of_scope := [row for row in found if row["part"] == scope]:
                    pieces.append(inference_table(scope, of_scope))
            cut = {}
            for row in found:
                if row["part"] == "sample" and row["steps"] == 1 and row.get("ms"):
                    decode = row["share_of_decode"]["50"] * row["ms"]
                    name = f"{row['variant']} {row['precision']}"
                    cut[name] = {"network": row["ms"] - decode, "decode": decode}
            if cut:
                figure = plots.stacked(f"A one-step sample: {title}", hardware(found), "ms a batch", cut)
                figures.append(page.figure(f"inference {title} {device_name(found[0])}", figure))
        vaes = dict.fromkeys(row["vae"] for row in group if row.get("vae"))
        lines = [f"Decoder: {vae}." for vae in vaes] + ["From asking for a batch to its end; ratios are of pairs."]
        reasons = (f"{r['part']} {r['variant']} was not timed: {why}." for r in group if (why := why_untimed(r)))
        pieces.append(figures_of(figures) + notes(lines + list(dict.fromkeys(reasons)) + older(left_over)))
    return "".join(pieces)


def inference_table(scope: str, rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if row.get("ms")):
        times, share = row.get("times"), row.get("share_of_decode")
        mib = row["call_bytes"] / 2**20 if row.get("call_bytes") else None
        line = [row["variant"], row["precision"], str(row["steps"] or NONE), number(row["ms"]), spread(row)]
        line += [number(row["images_per_second"]), speed_words(times and (times["50"], times["20"], times["80"]))]
        line += [number(row.get("tflops"), 3), percent(row.get("mfu")), number(mib)]
        line += [f"{row['difference']:.1e}" if "difference" in row else NONE]
        if scope == "sample":
            line += [row["decode"], percent(share["50"])]
        lines.append(line)
    header = [f"={scope}", "=precision", "steps", "ms", "20 to 80 %, ms", "images/s", "times as fast as the first"]
    header += ["TFLOP/s", "MFU", "a call's memory, MiB", "off the first's output"]
    return grid(header + (["=decode", "decode's share"] if scope == "sample" else []), lines, hardware(rows))


def accounting(page: Page, rows: list[dict]) -> str:
    rows, left_over = newest(rows, lambda row: (row["preset"], row["batch"], row["precision"], row.get("commit")))
    lines, bounds = [], []
    for row in rows:
        forwards = [f"{counted['flops'] / row['forward_flops']:.3f}" for counted in row["parts"].values()]
        total = sum(counted["flops"] for counted in row["parts"].values()) / row["forward_flops"]
        saved = row.get("saved_bytes")
        lines.append(
            [row["preset"], str(row["batch"]), row["precision"], number(row["forward_flops"] / 1e9), *forwards]
            + [f"{total:.3f}", number(row.get("step_in_forwards_unpadded")), number(saved and saved / 1e9)]
            + [str(row.get("commit") or "unknown")[:12], str(row.get("date"))[:10]]
        )
        if floor := row.get("floor"):
            words = f"{row['preset']}, batch {row['batch']}: no step is shorter than {number(row['floor_ms'])} ms on "
            words += f"{floor['gpu']} at {number(floor['gemm_tflops'])} TFLOP/s ({floor['gemm_source']}) and "
            bounds.append(words + f"{number(floor['copy_gbps'])} GB/s ({floor['copy_source']}): a bound, not a time.")
    header = ["=recipe", "batch", "=precision", "F, GFLOP", *(f"{name}, F" for name in rows[0]["parts"])]
    header += ["step, F", "without padding, F", "saved for backward, GB", "=commit", "=date"]
    caption = "Counted on the step's own code, the same on every machine; F is one forward pass of the batch."
    return grid(header, lines, caption) + notes(bounds + older(left_over))


def projection(page: Page, rows: list[dict]) -> str:
    tells = ("preset", "gpu", "gpus", "variant", "parallel")
    rows, left_over = newest(rows, lambda row: tuple(row.get(name) for name in tells))
    lines, bars, words = [], {}, {}
    for row in rows:
        gpus, name = row.get("gpus", 1), row["preset"]
        gpu_hours = row.get("gpu_hours", gpus * row["hours"])
        hours = [row["hours_hidden"]] if row.get("hours_hidden") is not None else []
        variant = ", ".join(filter(None, (row.get("variant"), row.get("parallel"))))
        lines.append([name, variant or NONE, row["gpu"], str(gpus), number(row.get("measured_ms"))])
        lines[-1] += [number(row.get("exchange_ms")), " to ".join(number(h) for h in (*hours, row["hours"]))]
        lines[-1] += [number(gpu_hours), row.get("note") or "", hardware([row])]
        label = f"{name}, {gpus} x {row['gpu']}, {variant or 'step'}"
        bars[label], words[label] = (gpu_hours,), f"{number(gpu_hours)} GPU-hours"
    header = ["=recipe", "=variant", "=GPU", "GPUs", "measured, ms a step", "exchange, ms (projection)"]
    header += ["hours (projection)", "GPU-hours (projection)", "=how", "=measured on"]
    badge = '<p><span class="badge">projection</span> computed from measured steps; no such run was made.</p>'
    figure = plots.bars("PROJECTION: GPU-hours of the recipes", hardware(rows), "GPU-hours, projected", bars, words)
    table = grid(header, lines, "Projections from the measured steps named in each line.")
    return badge + figures_of([page.figure("projection", figure)]) + table + notes(older(left_over))
