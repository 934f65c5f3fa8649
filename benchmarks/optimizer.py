"""Time the optimizer's step with the moving average, implementation beside implementation, in pairs.

python -m benchmarks.optimizer                       XL/2 on a GPU, S/4 on a CPU
python -m benchmarks.optimizer --model B/4 --threads 1

Each implementation has parameters of its own and takes the same steps; they take turns, so that what else the machine
does falls on all of them. Before anything is timed, all must have moved the parameters and averages alike.
"""

import argparse
import copy
import functools
import json
from dataclasses import replace
from pathlib import Path

import torch

from meanflow.config import ModelConfig, OptimConfig
from meanflow.errors import UserError
from meanflow.model.build import build_net
from meanflow.training.optim import make_optimizer
from meanflow_kernels.adamw_ema import adamw_ema_bytes

from .harness import arbiter
from .harness.arguments import BadInput, positive
from .harness.clock import ColdCache, device_ms, host_ms, measure_ceilings, quantiles, wall_ms
from .harness.environment import clocks, environment
from .harness.table import table

IMPLEMENTATIONS = ("native", "torch", "apex")
CHECKED_STEPS = 3


class Optimizer:
    """An implementation with parameters, gradients and averages."""

    def __init__(self, implementation: str, net: torch.nn.Module, device: str):
        self.net = copy.deepcopy(net).to(device)
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        generator = torch.Generator(device).manual_seed(0)
        for p in self.net.parameters():
            p.grad = torch.randn(p.shape, device=device, generator=generator)
        optim = OptimConfig(implementation=implementation)
        self.step = make_optimizer(replace(optim, ema_decay=0.9), self.net, self.ema).step

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in (*self.net.parameters(), *self.ema.parameters())])


def build(model: str, device: str) -> tuple[dict[str, Optimizer], list[str]]:
    """The implementations that are here, and why others are not.

    Raises:
        SystemExit: where one moves the weights elsewhere.
    """
    net = build_net(ModelConfig.official(model))
    found, missing, reference = {}, [], None
    for name in IMPLEMENTATIONS:
        try:
            found[name] = Optimizer(name, net, device)
        except UserError as error:
            missing.append(str(error))
            continue
        for _ in range(CHECKED_STEPS):
            found[name].step()
        weights = found[name].weights()
        reference = weights if reference is None else reference
        error = (weights - reference).abs().max().item()
        if not error <= 1e-6:
            raise SystemExit(f"{name}: weights {error:.1e} off, nothing was timed")
    return found, missing


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.optimizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default=None, help="whose parameters (default XL/2, on a CPU S/4)")
    parser.add_argument("--repeats", type=positive, default=30, help="timed steps each (default 30)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    arbiter.add_argument(parser)
    options = parser.parse_args(args)
    arbiter.join(options.turns)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.model or ("XL/2" if options.device == "cuda" else "S/4")
    try:
        optimizers, missing = build(model, options.device)
    except UserError as error:
        raise BadInput(f"benchmarks.optimizer: error: {error}") from None
    samples = {name: [] for name in optimizers}
    with arbiter.alone(options.device):
        for turn in range(options.repeats):
            for name in optimizers if turn % 2 else reversed(optimizers):
                samples[name].append(one_ms(optimizers[name].step, options.device))
        found = clocks(options.device)
        copy_gbps = measure_ceilings(options.device).copy_gbps
    numel = sum(p.numel() for p in optimizers["native"].net.parameters())
    moved = adamw_ema_bytes(numel, emas=1, copies=False)
    rows = []
    for name, times in samples.items():
        low, ms, high = quantiles(times)
        ratios = quantiles([a / b for a, b in zip(samples["torch"], times, strict=True)])
        rows.append({"op": "adamw_ema", "model": model, "parameters": numel, "implementation": name, "ms": ms,
                     "ms_20": low, "ms_80": high, "samples": len(times), "bytes": moved, "gbps": moved / ms / 1e6,
                     "copy_gbps": copy_gbps, "times_torch": dict(zip(("20", "50", "80"), ratios, strict=True))}
                    | found | environment(options.device, options.commit))  # fmt: skip
    if options.rows:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(report(rows, missing))


cold_cache = functools.cache(ColdCache)


def one_ms(step, device: str) -> float:
    if device == "cuda":
        return device_ms(step, cold_cache(), host_ms(step, device, samples=1), samples=1)[0]
    return wall_ms(step, samples=1)[0]


def report(rows: list[dict], missing: list[str]) -> str:
    head = rows[0]
    where = head["gpu"] or f"CPU ({head['cpu']}, {head['threads']} threads)"
    lines = [
        [r["implementation"], f"{r['ms']:.2f}", f"{r['ms_20']:.2f} to {r['ms_80']:.2f}", f"{r['gbps']:.4g}",
         f"{r['gbps'] / r['copy_gbps']:.0%}", f"{r['times_torch']['50']:.2f}",
         f"{r['times_torch']['20']:.2f} to {r['times_torch']['80']:.2f}"]
        for r in rows
    ]  # fmt: skip
    header = ["AdamW + average", "ms", "20 to 80 %", "GB/s", "of a copy", "x torch", "20 to 80 %"]
    title = f"{head['model']}, {head['parameters'] / 1e6:.1f} M fp32 parameters, {head['bytes'] / 1e9:.2f} GB, {where}"
    return "\n".join([title, table(header, lines), *missing])


if __name__ == "__main__":
    main()
