"""Time the training step by variant, on synthetic latents of the real shape.

python -m benchmarks.step --model XL/2 --batch 32 --compare naive,naive-compiled,ours
python -m benchmarks.step --device cpu --model S/4 --batch 32 --precision fp32 --kappa 0.5

All variants make the same steps: same weights, draws, dtype and recipe, guidance, backward, optimizer and moving
average included; what the host does before (reading data, drawing times, planning) is not. Gradients are compared
before anything is timed. On a CPU the variants take turns, so that what else the machine does falls on all of them, and
the ratios are of pairs; on a GPU each is built, timed and freed alone, so that its peak memory is its own.
"""

import argparse
import functools
import gc
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from meanflow.config import ModelConfig, ObjectiveConfig, RunConfig
from meanflow.errors import UserError
from meanflow.peaks import PEAKS
from meanflow.presets import preset

from .accounting import account
from .environment import clocks, energy, environment, merge
from .table import table
from .timing import quantiles, stamp
from .variants import VARIANTS, Variant, Workload

GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""||g - g_first|| / ||g_first||: the rounding of two orders of summation, far below any mistake's."""


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, where, and where the rows go."""
    parser.add_argument("--preset", default=None, help="a recipe's model and objective, instead of those below")
    parser.add_argument("--model", default="XL/2", help="size and patch, for instance B/4 (default XL/2)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument(
        "--input-size", type=int, default=32, help="side of the latents; 64 is ImageNet-512 (default 32)"
    )
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products and attention")
    parser.add_argument("--omega", type=float, default=1.0, help="guidance: weight of the sample's velocity")
    parser.add_argument(
        "--kappa", type=float, default=0.5, help="guidance: weight of u(z,t,t|y); 0 and omega 1 is none"
    )
    parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), help="t that is guided (default 0 1)")
    parser.add_argument("--share", type=float, default=0.25, help="share of r != t (default 0.25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="timed steps")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")


def make_workload(options: argparse.Namespace) -> Workload:
    """What the arguments ask for.

    Raises:
        UserError: for a value out of range.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    if options.preset:
        recipe = preset(options.preset)
        model, objective = recipe.model, recipe.objective
    else:
        model = ModelConfig.official(options.model, input_size=options.input_size)
        objective = ObjectiveConfig(
            omega=options.omega, kappa=options.kappa, share_equal=1 - options.share,
            guidance_start=options.interval[0], guidance_end=options.interval[1],
        )  # fmt: skip
    return Workload.of(model, objective, options.batch, options.device, options.precision)


def identity(work: Workload, preset: str | None = None) -> dict:
    """The columns of a row that say what was trained."""
    model, objective = work.run.model, work.run.objective
    return {
        "preset": preset,
        "model": model.name,
        "batch": work.run.train.batch,
        "tokens": model.tokens,
        "precision": work.run.train.precision,
        "omega": objective.omega,
        "kappa": objective.kappa,
        "interval": (objective.guidance_start, objective.guidance_end),
        "share": 1 - objective.share_equal,
    }


def append(rows: list[dict], options: argparse.Namespace) -> list[dict]:
    """The rows with where and when; they are written too, if a file is named."""
    rows = [merge(row, environment(options.device, options.commit)) for row in rows]
    if options.rows:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--compare", default="naive,naive-compiled,ours", help=f"some of {','.join(VARIANTS)}")
    add_workload_arguments(parser)
    options = parser.parse_args(args)
    names = options.compare.split(",")
    if unknown := set(names) - VARIANTS.keys():
        raise SystemExit(f"--compare: got {sorted(unknown)}, wanted some of {','.join(VARIANTS)}; see --help")
    try:
        work = make_workload(options)
    except UserError as error:
        raise SystemExit(f"benchmarks.step: error: {error}") from None
    measure = in_turn if options.device == "cuda" else interleaved
    rows = measure(work, names, options.repeats or (30 if options.device == "cuda" else 10))
    rows = append([identity(work, options.preset) | row for row in rows], options)
    print(report(rows))


def interleaved(work: Workload, names: list[str], repeats: int) -> list[dict]:
    """All variants side by side, a step each in turn; ratios are of the pairs of a turn."""
    variants, compile_seconds, reference = {}, {}, None
    for name in names:
        variants[name], compile_seconds[name], reference = start(work, name, reference)
    samples = {name: [] for name in names}
    for step in tqdm(range(repeats), desc="timing", unit="turn"):
        inputs = work.inputs(step)
        # every other turn backwards, so that nobody always follows the same neighbour
        for name in names if step % 2 else reversed(names):
            samples[name].append(timed(variants[name], inputs, work.device))
    return [row(name, samples[name], work, compile_seconds[name]) | against(samples, name) for name in names]


def in_turn(work: Workload, names: list[str], repeats: int) -> list[dict]:
    """Each variant alone on the GPU."""
    rows, samples, reference = [], {}, None
    batches = [work.inputs(step) for step in range(repeats)]
    for name in tqdm(names, desc="timing", unit="variant"):
        variant, seconds, reference = start(work, name, reference)
        timed(variant, batches[0], work.device)
        torch.cuda.reset_peak_memory_stats()
        before = energy()
        samples[name] = [timed(variant, inputs, work.device) for inputs in batches]
        memory = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        used = joules(before, energy(), repeats * work.run.train.batch)
        rows.append(merge(row(name, samples[name], work, seconds), memory, used, against(samples, name), clocks()))
        del variant
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def joules(before: dict, after: dict, images: int) -> dict:
    """The GPU's energy for an image, waiting between steps included, or why it is not known."""
    if "joules" in before and "joules" in after:
        return {"joules_per_image": (after["joules"] - before["joules"]) / images}
    return {"missing": {"joules_per_image": before["missing"]["joules"]}}


def start(work: Workload, name: str, reference: torch.Tensor | None) -> tuple[Variant, float, torch.Tensor]:
    """Build a variant and take its first step, whose gradient must be the reference's.

    Raises:
        SystemExit: where it is another.
    """
    variant, inputs = VARIANTS[name](work), work.inputs(0)
    begin = time.perf_counter()
    timed(variant, inputs, work.device)
    seconds = time.perf_counter() - begin
    gradient = variant.gradient()
    reference = gradient if reference is None else reference
    difference = ((gradient - reference).norm() / reference.norm()).item()
    if not difference <= GRADIENT_TOLERANCE[work.run.train.precision]:
        raise SystemExit(f"{name}: its gradient is {difference:.2e} off, nothing was timed")
    print(f"{name}: first step after {seconds:.1f} s, gradient {difference:.1e} off", flush=True)
    return variant, seconds, reference


def timed(variant: Variant, inputs, device: str) -> float:
    """Milliseconds of one step, from asking for it to its end."""
    variant.prepare(inputs)
    begin = stamp(device)
    variant.step()
    return stamp(device) - begin


def against(samples: dict[str, list[float]], name: str) -> dict:
    """How many times as fast a variant is as the first, and as the compiled naive step: quantiles over the pairs."""
    bases = {base for base in (next(iter(samples)), "naive-compiled") if base in samples and base != name}
    pairs = {base: [a / b for a, b in zip(samples[base], samples[name], strict=True)] for base in bases}
    return {
        "times": {base: dict(zip(("20", "50", "80"), quantiles(found), strict=True)) for base, found in pairs.items()}
    }


def row(name: str, samples: list[float], work: Workload, first_step_seconds: float) -> dict:
    low, ms, high = quantiles(samples)
    needed = needed_flops(work.run)
    peak = PEAKS.get(torch.cuda.get_device_name()) if work.device == "cuda" else None
    return {
        "kind": "step",
        "variant": name,
        "ms": ms,
        "ms_20": low,
        "ms_80": high,
        "samples": len(samples),
        "images_per_second": 1e3 * work.run.train.batch / ms,
        "first_step_seconds": first_step_seconds,
        "needed_flops": needed,
        "tflops": needed / ms / 1e9,
        "mfu": needed / ms / 1e9 / peak.tflops if peak and work.run.train.precision == "bf16" else None,
    }


@functools.cache
def needed_flops(run: RunConfig) -> float:
    """What the recipe needs, whoever computes it: the planned step without its padding, mean of 100 drawn batches."""
    accounts = account(run, batches=100)
    return accounts["step_in_forwards_unpadded"] * accounts["forward_flops"]


def title(row: dict) -> str:
    """What was trained, and where."""
    where = row["gpu"] or f"CPU ({row['cpu']}, {row['threads']} threads)"
    guided = f"omega {row['omega']:g}, kappa {row['kappa']:g}, t in {list(row['interval'])}"
    shape = f"{row['model']}, batch {row['batch']}, {row['tokens']} tokens, {row['precision']}"
    return f"{shape}, {guided}, r != t {row['share']:.0%}, {where}"


def report(rows: list[dict]) -> str:
    """The variants as a table."""
    head, text = rows[0], title(rows[0])
    bases = sorted({base for r in rows for base in r["times"]})
    lines = []
    for r in rows:
        memory = f"{r['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in r else "-"
        times = (r["times"].get(base) for base in bases)
        lines.append([r["variant"], f"{r['ms']:.1f}", f"{r['ms_20']:.1f} to {r['ms_80']:.1f}",
                      f"{r['images_per_second']:.1f}",
                      *(f"{x['50']:.2f} ({x['20']:.2f} to {x['80']:.2f})" if x else "-" for x in times),
                      memory, f"{r['first_step_seconds']:.0f}"])  # fmt: skip
        if r["mfu"]:
            lines[-1].append(f"{r['mfu']:.1%}")
    header = ["step", "ms", "20 to 80 %", "img/s", *(f"x {base}" for base in bases), "peak GiB", "first step s"]
    if head["mfu"]:
        header.append("MFU")
        text += f"\nMFU: {head['needed_flops'] / 1e12:.1f} TFLOP that the recipe needs, over time and datasheet peak"
    return f"{text}\n{table(header, lines)}"


if __name__ == "__main__":
    main()
