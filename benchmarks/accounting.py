"""Count the work of a training step: ``python -m benchmarks.accounting --preset NAME --batch B``.

FLOPs of each pass of the step, counted by torch's counter on the step's own code over meta tensors: nothing is
computed, and the kernels are counted as the operators that they are. F is one plain forward of the network on the
batch, to u where it has a head for v too. A product of matrices counts, a pointwise operator does not
(meanflow_kernels.counts).

    guidance    the forward whose rows the plan lists, padded to a declared size
    primal      the forward that is differentiated
    tangent     what the derivative adds to it
    backward    of the primal alone

Beside them: the step without the product that attention's backward makes a second time, which is no part of the
mathematics; the bytes that autograd keeps for the backward, next to those of flow matching, with a head for v if the
step trains one; those of the weights and the optimizer; and a lower bound of the step's time on a GPU by kind of work,
products at the rate of a large one and the fewest bytes at a copy's, with the newest committed measurement of that
step, if there is one.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from meanflow.errors import UserError
from meanflow.presets import preset

from .counting.accounts import BATCHES, account
from .counting.floor import find_rates, floor, least_bytes, measured_step
from .harness.arguments import finite
from .harness.environment import environment, known_gpu
from .harness.table import table


def text(report: dict) -> str:
    """The accounts as a table with a few lines below it."""
    f, batch = report["forward_flops"], report["batch"]
    rows = [
        [name, f"{counted['flops'] / 1e9:.1f}", f"{counted['forwards']:.4f}"]
        + [f"{counted[kind] / 1e9:.1f}" for kind in ("linear", "attention")]
        for name, counted in (*report["parts"].items(), ("step", report["step"]))
    ]
    head = f"{report['preset']}, batch {batch}, {report['precision']}, mean of {report['batches']} drawn batches; "
    head += f"F = {f / 1e9:.1f} GFLOP, {f / batch / 2e9:.2f} GMAC a sample"
    steps = f"step in F: {report['step_in_forwards']:.4f} padded, {report['step_in_forwards_unpadded']:.4f} unpadded"
    steps += f"; {report['step_in_forwards_unrepeated']:.4f} padded without what attention's backward computes again"
    if report["ranks"] > 1:
        steps += f", {report['step_in_forwards_slowest_rank']:.4f} on the slowest of {report['ranks']} ranks"
    saved, plain = report["saved_bytes"], report["saved_bytes_flow_matching"]
    memory = f"saved for the backward: {saved / 1e9:.3f} GB, "
    memory += f"{saved / plain:.4f} of flow matching's {plain / 1e9:.3f} GB"
    weights = f"parameters: {report['parameters'] / 1e6:.1f} M, {report['parameter_bytes'] / 1e9:.3f} GB; optimizer: "
    weights += f"{report['optimizer_bytes'] / 1e9:.3f} GB moved a step, "
    weights += f"{report['optimizer_state_bytes'] / 1e9:.3f} GB held (two moments, average)"
    columns = ["pass", "GFLOP", "F", "linear", "attention"]
    return "\n".join([head, table(columns, rows), steps, memory, weights, _floor(report)])


def _floor(report: dict) -> str:
    if report["floor_ms"] is None:
        return "floor: none, no rate of fp32 products is known; give --gemm-tflops"
    of_floor, total = report["floor"], report["floor_ms"]
    head = f"floor on {of_floor['gpu']}, at {of_floor['gemm_tflops']:.4g} TFLOP/s ({of_floor['gemm_source']}) and "
    head += f"{of_floor['copy_gbps']:.4g} GB/s ({of_floor['copy_source']}):"
    rows = []
    for name, kind in of_floor["kinds"].items():
        amount = f"{kind['flops'] / 1e12:.2f} TFLOP" if "flops" in kind else f"{kind['bytes'] / 1e9:.2f} GB"
        rows.append([name, amount, f"{kind['ms']:.2f}", f"{kind['ms'] / total:.0%}"])
    rows.append(["floor", "", f"{total:.2f}", "100%"])
    if step := report["measured"]:
        where = f"{step['variant']}, {step['commit'][:7]}, {step['date'][:10]}"
        rows.append(["measured step", where, f"{step['ms']:.2f}", f"{step['ms'] / total:.0%}"])
    return "\n".join([head, table(["work", "amount", "ms", "of the floor"], rows)])


def arguments(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.accounting", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--preset", required=True, help="a recipe, as for scripts/train.py")
    parser.add_argument("--batch", type=int, required=True, help="samples a step of one rank")
    for name in ("omega", "kappa", "share"):
        parser.add_argument(f"--{name}", type=finite, help="as for benchmarks.step, instead of the recipe's")
    parser.add_argument("--interval", type=finite, nargs=2, help="as for benchmarks.step, instead of the recipe's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of products and attention")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that train together, for the mean of the slowest"
    )
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"drawn batches of a mean (default {BATCHES})")
    parser.add_argument("--gpu", default=known_gpu(), help="the GPU of the floor, as its driver names it")
    parser.add_argument("--gemm-tflops", type=finite, help="its rate of matrix products, where you have measured it")
    parser.add_argument("--copy-gbps", type=finite, help="its rate of copies, read plus written, where measured")
    parser.add_argument("--json", type=Path, help="write the accounts to this file too")
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Print the accounts; exit code 2 for bad input."""
    options = arguments(args)
    try:
        report = accounts_of(options)
    except UserError as error:
        print(f"benchmarks.accounting: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(text(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report | {"environment": environment("cpu")}, indent=1) + "\n")


def accounts_of(options: argparse.Namespace) -> dict:
    """The accounts and the floor."""
    config = preset(options.preset)
    config = replace(config, train=replace(config.train, batch=options.batch, precision=options.precision))
    given = {"omega": options.omega, "kappa": options.kappa}
    if options.share is not None:
        given["share_equal"] = 1 - options.share
    given["guidance_start"], given["guidance_end"] = options.interval or (None, None)
    given = {name: value for name, value in given.items() if value is not None}
    config = replace(config, objective=replace(config.objective, **given))
    gemm, copy = find_rates(options.gpu, gemm_tflops=options.gemm_tflops, copy_gbps=options.copy_gbps)
    report = {"preset": options.preset} | account(config, ranks=options.ranks, batches=options.batches)
    # neither the datasheets here nor the measured ceilings are of fp32 products
    if options.precision == "fp32" and gemm.source != "given":
        report |= {"floor_ms": None, "floor": None}
    else:
        flops = {f"{kind} products": report["step"][kind] for kind in ("linear", "attention")}
        report |= floor(flops, least_bytes(config, report), options.gpu, gemm, copy)
        report["measured"] = measured_step(config, options.gpu)
    return report


if __name__ == "__main__":
    main()
