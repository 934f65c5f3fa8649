"""Time the training step by variant, on synthetic latents of the real shape.

python -m benchmarks.step --model XL/2 --batch 32 --compare naive,naive-compiled,ours
python -m benchmarks.step --device cpu --model S/4 --batch 32 --precision fp32 --kappa 0.5

All variants make the same steps: same weights, draws, dtype and recipe, guidance, backward, optimizer and moving
average included; what the host does before (reading data, drawing times, planning) is not. Gradients are compared
before anything is timed. On a CPU the variants take turns, so that what else the machine does falls on all of them, and
the ratios are of pairs; on a GPU each is built, timed and freed alone, so that its peak memory is its own.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from meanflow.config import ObjectiveConfig
from meanflow.errors import UserError

from .environment import clocks, environment
from .table import table
from .timing import quantiles
from .variants import VARIANTS, Variant, Workload

GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""||g - g_first|| / ||g_first||: the rounding of two orders of summation, far below any mistake's."""


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="XL/2", help="size and patch, for instance B/4 (default XL/2)")
    parser.add_argument("--batch", type=int, default=32, help="samples a step (default 32)")
    parser.add_argument("--compare", default="naive,naive-compiled,ours", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products and attention")
    parser.add_argument("--omega", type=float, default=1.0, help="guidance: weight of the sample's velocity")
    parser.add_argument(
        "--kappa", type=float, default=0.5, help="guidance: weight of u(z,t,t|y); 0 and omega 1 is none"
    )
    parser.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), help="t that is guided (default 0 1)")
    parser.add_argument("--share", type=float, default=0.25, help="share of r != t (default 0.25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="timed steps a variant (default 10, on a GPU 30)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    options = arguments(args)
    names = options.compare.split(",")
    if unknown := set(names) - VARIANTS.keys():
        raise SystemExit(f"--compare: got {sorted(unknown)}, wanted some of {','.join(VARIANTS)}; see --help")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    try:
        objective = ObjectiveConfig(
            omega=options.omega, kappa=options.kappa, share_equal=1 - options.share,
            guidance_start=options.interval[0], guidance_end=options.interval[1],
        )  # fmt: skip
        work = Workload.of(options.model, options.batch, options.device, options.precision, objective)
    except UserError as error:
        raise SystemExit(f"benchmarks.step: error: {error}") from None
    repeats = options.repeats or (30 if options.device == "cuda" else 10)
    measure = in_turn if options.device == "cuda" else interleaved
    rows = measure(work, names, repeats)
    name = {"model": options.model, "batch": options.batch, "precision": options.precision, "omega": options.omega,
            "kappa": options.kappa, "interval": options.interval, "share": options.share}  # fmt: skip
    stamp = environment(options.device, options.commit)
    rows = [name | row | stamp for row in rows]
    if options.rows:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
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
        samples[name] = [timed(variant, inputs, work.device) for inputs in batches]
        rows.append(
            row(name, samples[name], work, seconds)
            | {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
            | against(samples, name)
            | clocks()
        )
        del variant
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


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
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    variant.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def against(samples: dict[str, list[float]], name: str) -> dict:
    """How many times as fast a variant is as the first, and as the compiled naive step: quantiles over the pairs."""
    bases = {base for base in (next(iter(samples)), "naive-compiled") if base in samples and base != name}
    pairs = {base: [a / b for a, b in zip(samples[base], samples[name], strict=True)] for base in bases}
    return {
        "times": {base: dict(zip(("20", "50", "80"), quantiles(found), strict=True)) for base, found in pairs.items()}
    }


def row(name: str, samples: list[float], work: Workload, first_step_seconds: float) -> dict:
    low, ms, high = quantiles(samples)
    return {
        "variant": name,
        "ms": ms,
        "ms_20": low,
        "ms_80": high,
        "samples": len(samples),
        "images_per_second": 1e3 * work.run.train.batch / ms,
        "first_step_seconds": first_step_seconds,
    }


def report(rows: list[dict]) -> str:
    head = rows[0]
    where = head["gpu"] or f"CPU ({head['cpu']}, {head['threads']} threads)"
    guided = f"omega {head['omega']:g}, kappa {head['kappa']:g}, t in {list(head['interval'])}"
    title = (
        f"{head['model']}, batch {head['batch']}, {head['precision']}, {guided}, r != t {head['share']:.0%}, {where}"
    )
    bases = sorted({base for r in rows for base in r["times"]})
    lines = []
    for r in rows:
        memory = f"{r['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in r else "-"
        times = (r["times"].get(base) for base in bases)
        lines.append([r["variant"], f"{r['ms']:.1f}", f"{r['ms_20']:.1f} to {r['ms_80']:.1f}",
                      f"{r['images_per_second']:.1f}",
                      *(f"{x['50']:.2f} ({x['20']:.2f} to {x['80']:.2f})" if x else "-" for x in times),
                      memory, f"{r['first_step_seconds']:.0f}"])  # fmt: skip
    header = ["step", "ms", "20 to 80 %", "img/s", *(f"x {base}" for base in bases), "peak GiB", "first step s"]
    return f"{title}\n{table(header, lines)}"


if __name__ == "__main__":
    main()
