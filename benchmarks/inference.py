"""Time sampling: the network's steps, the VAE's decoding, and both together, by every way to run them.

python -m benchmarks.inference --model XL/2 --batch 1 64
python -m benchmarks.inference --device cpu --model S/2 --input-size 8 --batch 4 --network eager --decode plain bf16

The network runs eager, compiled, and compiled and captured in a CUDA graph, in fp32 (TF32 products on a GPU) and bf16,
for 1, 2 and 4 steps. The decoder is Stable Diffusion's (sd-vae-ft-mse's configuration, with random weights unless --vae
names some: times do not depend on them), with the options that diffusers has for it. A sample is a network's way with
the decoder's way beside it (`SAMPLES`).

Nothing is timed before its output has been compared with that of the first of its kind; tiling blends tiles, so its
difference is told and not judged. All ways take turns, and ratios are of the pairs of a turn. A time is from asking for
a batch to its end, so at batch 1 it is the latency; the decoder's share of a sample is of the same call. What cannot
run here, or would be another way's run, is a row with its reason. Exit code 1: an output is another, or a way failed.
"""

import argparse
import copy
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ModelConfig
from meanflow.data.vae import load_vae
from meanflow.errors import UserError, require
from meanflow.method.sampling import Sampler, even_times
from meanflow.model.build import build_net
from meanflow.training.flops import sample_flops
from meanflow.training.peaks import PEAKS

from .harness import arbiter
from .harness.arguments import BadInput, available, finite, positive
from .harness.clock import quantiles, stamp
from .harness.environment import clocks, merge
from .harness.errors import TOLERANCE
from .harness.rows import append
from .harness.table import table
from .harness.turns import Reason, attempt, turns
from .workloads.decoders import DECODES, DTYPES, random_vae
from .workloads.step_workload import initial_weights

NETWORKS = ("eager", "compiled", "cuda-graph")
REPEATS = {"cuda": 20, "cpu": 10}


SAMPLES = {
    ("eager", "fp32"): "plain", ("compiled", "fp32"): "compiled", ("cuda-graph", "fp32"): "compiled",
    ("eager", "bf16"): "bf16", ("compiled", "bf16"): "bf16-compiled", ("cuda-graph", "bf16"): "bf16-compiled",
}  # fmt: skip
"""The decoder's way beside each of the network's."""


class Way(NamedTuple):
    """Something to time."""

    scope: str
    """network, decode or sample."""
    variant: str
    precision: str
    steps: int | None
    """None for the decoder alone."""
    stages: tuple[Callable, ...] | Reason
    """Each takes what the one before it returns: the network, the decoder, or both; or why there are none."""
    judged: bool = True
    """True if its output must be that of the first way of its group."""
    decode: str | None = None
    """The decoder's way of a sample; None for a network or a decoder alone."""

    @property
    def group(self) -> tuple:
        """Ways with the same output."""
        return self.scope, self.steps

    def run(self, noise: Tensor, mark: Callable[[], object] = lambda: None) -> Tensor:
        """The output; ``mark`` is called between its stages."""
        x = noise
        for i, stage in enumerate(self.stages):
            if i:
                mark()
            x = stage(x)
        return x


class Sample(NamedTuple):
    """A call's time."""

    ms: float
    share: float
    """The last stage's share of that time."""


class Workload:
    """A network, a decoder and a batch.

    Args:
        vae: the decoder's weights: a folder or name for diffusers; "" for random ones.
    """

    def __init__(self, model: ModelConfig, batch: int, device: str, vae: str = ""):
        self.model, self.batch, self.device = model, batch, device
        self.net = build_net(model).eval().requires_grad_(False)
        self.net.load_state_dict(initial_weights(model, device))
        self.net.to(device)
        self.vae, self.no_vae = None, None
        try:
            self.vae = load_vae(vae, torch.device(device), "vae") if vae else random_vae(device)
        except ImportError as error:
            # the network is timed without
            self.no_vae = Reason(f"the decoder needs diffusers ({error})", failed=False)
        self.vae_name = vae or "sd-vae-ft-mse's configuration, random weights"
        if self.vae is not None:
            # sampling needs the decoder alone
            self.vae.encoder = self.vae.quant_conv = None
            channels, wanted = self.vae.config.latent_channels, f"the model's {model.in_channels}"
            require(channels == model.in_channels, "vae", f"{channels} channels", wanted, "name another")
        generator = torch.Generator().manual_seed(0)
        shape = (batch, model.in_channels, model.input_size, model.input_size)
        self.noise = torch.randn(shape, generator=generator).to(device)
        self.labels = torch.randint(model.num_classes, (batch,), generator=generator).to(device)

    def ways(self, networks: list[str], decodes: list[str], precisions: list[str], steps: list[int]) -> Iterator[Way]:
        """Everything to time; the first of each group is what its others are compared with."""
        nets = {"fp32": self.net} | {p: copy.deepcopy(self.net).to(DTYPES[p]) for p in precisions if p != "fp32"}
        sampled, decoded = {}, {}
        for precision in precisions:
            for name in networks:
                sampled[name, precision] = self._sampler(name, nets[precision])
        for name in decodes:
            decoded[name] = self._decoder(name)
        for count in steps:
            for (name, precision), sampler in sampled.items():
                yield Way("network", name, precision, count, _stages(sampler, steps=count))
        for name, decoder in decoded.items():
            option = DECODES[name]
            yield Way("decode", name, option.precision, None, _stages(decoder), judged=not option.tiling)
        for count in steps:
            for (name, precision), sampler in sampled.items():
                decode = SAMPLES[name, precision]
                if decode in decoded:
                    stages = _stages(sampler, decoded[decode], steps=count)
                    yield Way("sample", name, precision, count, stages, decode=decode)

    def _sampler(self, name: str, net: nn.Module) -> Callable[[Tensor, int], Tensor] | Reason:
        if name == "cuda-graph" and self.device != "cuda":
            return Reason("CUDA graphs need a GPU", failed=False)
        sampler = Sampler(net, compile=name != "eager", cuda_graph=name == "cuda-graph")
        return lambda noise, steps: sampler(noise, self.labels, even_times(steps))

    def _decoder(self, name: str) -> Callable[[Tensor], Tensor] | Reason:
        option = DECODES[name]
        if self.no_vae:
            return self.no_vae
        if why := option.passed_over(self.vae, self.noise):
            return Reason(why, failed=False)
        vae, scale = option.apply(self.vae), self.vae.config.scaling_factor

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            return vae.decode((latents / scale).to(vae.dtype), return_dict=False)[0].float()

        return decode

    def flops(self, way: Way) -> float:
        """Floating-point operations of a batch's matrix products and convolutions."""
        network = self.batch * self.forward_flops * (way.steps or 0)
        return network + (self.decode_flops if way.scope != "network" else 0)

    def count(self) -> None:
        """Count what a sample's evaluation and the batch's decoding take, on tensors without memory."""
        self.forward_flops = sample_flops(self.model).forward
        if self.vae is None:
            return
        vae = copy.deepcopy(self.vae).to("meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.decode(torch.empty_like(self.noise[:1], device="meta"))
        self.decode_flops = self.batch * counter.get_total_flops()


def _stages(first, *others, steps: int | None = None) -> tuple[Callable, ...] | Reason:
    """The stages of a way, the first for so many steps; or the first reason why there is none."""
    for stage in (first, *others):
        if isinstance(stage, Reason):
            return stage
    return (first if steps is None else functools.partial(first, steps=steps), *others)


# --- measuring ---


def first_call(work: Workload, way: Way, references: dict[tuple, tuple[str, Tensor]]) -> dict | Reason:
    """Run a way once, which compiles it, and compare; its columns.

    Raises:
        SystemExit: where its output is another than the first's.
    """
    if isinstance(way.stages, Reason):
        return way.stages
    device, begin = work.device, arbiter.running_seconds()
    output = way.run(work.noise)
    stamp(device)
    columns = {"first_call_seconds": arbiter.running_seconds() - begin, "against": None}
    if way.scope == "network":
        # what the network adds: the noise would hide its mistakes
        output = output - work.noise
    if way.group not in references:
        references[way.group] = (f"{way.variant}, {way.precision}", output)
    else:
        against, wanted = references[way.group]
        difference = ((output - wanted).norm() / wanted.norm()).item()
        rounding = "tf32" if (device, way.precision) == ("cuda", "fp32") else way.precision
        if way.judged and not difference <= TOLERANCE[rounding]:
            raise SystemExit(
                f"{way.scope} {way.variant}, {way.precision}: its output is {difference:.2e} off that of {against}, "
                "nothing was timed"
            )
        columns |= {"against": against, "difference": difference}
    if device == "cuda":
        columns["call_bytes"] = working_memory(lambda: way.run(work.noise))
    return columns


def working_memory(run: Callable[[], Tensor]) -> int:
    """Bytes that a call allocates at most, beside what is there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(work: Workload, ways: list[Way], repeats: int, seconds: float) -> list[dict]:
    """The rows of the ways, in their order."""
    references, columns, reasons = {}, {}, {}
    for way in ways:
        columns[way], reasons[way] = attempt(lambda way=way: first_call(work, way, references))
    samples = {way: [] for way in ways if not reasons[way]}
    with arbiter.alone(work.device):
        for turn in turns(repeats, seconds):
            # every other turn backwards, so that nobody always follows the same neighbour
            for way in samples if turn % 2 else reversed(samples):
                samples[way].append(timed(work, way))
        found = clocks(work.device)
    work.count()
    rows = []
    for way in ways:
        if why := reasons[way]:
            row = {"ms": None, "failed": why.failed, "missing": {"ms": why.words}}
        else:
            row = columns[way] | timings(work, way, samples)
        rows.append(merge(identity(work, way), row, found))
    return rows


def timed(work: Workload, way: Way) -> Sample:
    """One call."""
    cuda, marks = work.device == "cuda", []

    def mark() -> None:
        # between stages the host does not wait for the GPU
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else 1e3 * time.perf_counter())
        if cuda:
            marks[-1].record()

    begin = stamp(work.device)
    mark()
    way.run(work.noise, mark)
    mark()
    ms = stamp(work.device) - begin
    last, whole = (a.elapsed_time(marks[-1]) if cuda else marks[-1] - a for a in (marks[-2], marks[0]))
    return Sample(ms, last / whole)


def identity(work: Workload, way: Way) -> dict:
    """The columns that say what was timed."""
    row = {"kind": "inference", "part": way.scope, "variant": way.variant, "model": work.model.name}
    row |= {"batch": work.batch, "input_size": work.model.input_size, "tokens": work.model.tokens}
    row |= {"precision": way.precision, "steps": way.steps}
    return row | ({} if way.scope == "network" else {"vae": work.vae_name, "decode": way.decode or way.variant})


def timings(work: Workload, way: Way, samples: dict[Way, list[Sample]]) -> dict:
    low, ms, high = quantiles([sample.ms for sample in samples[way]])
    flops = work.flops(way)
    peak = PEAKS.get(torch.cuda.get_device_name()) if work.device == "cuda" else None
    first = next(other for other in samples if other.group == way.group)
    row = {
        "ms": ms,
        "ms_20": low,
        "ms_80": high,
        "samples": len(samples[way]),
        "images_per_second": 1e3 * work.batch / ms,
    }
    ratios = [a.ms / b.ms for a, b in zip(samples[first], samples[way], strict=True)]
    row |= {"flops": flops, "tflops": flops / ms / 1e9, "times": _spread(ratios)}
    row["mfu"] = row["tflops"] / peak.tflops if peak and way.precision != "fp32" else None
    if way.scope == "sample":
        row["share_of_decode"] = _spread([sample.share for sample in samples[way]])
    return row


def _spread(values: list[float]) -> dict[str, float]:
    return dict(zip(("20", "50", "80"), quantiles(values), strict=True))


# --- the command ---


def parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.inference", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="XL/2", help="size and patch, for instance B/4 (default XL/2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="images at a time (default 1 64)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="evaluations an image (default 1 2 4)")
    parser.add_argument("--input-size", type=int, default=32, help="side of the latents (default 32, 256x256 images)")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default all")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--decode", nargs="+", choices=DECODES, default=list(DECODES), help="default all")
    parser.add_argument("--vae", default="", help="decoder: a folder or name for diffusers (default random weights)")
    parser.add_argument("--device", type=available, choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--repeats", type=positive, default=None, help="turns")
    parser.add_argument("--seconds", type=finite, default=math.inf, help="no turn is begun after these, but three are")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads (default torch's)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    arbiter.add_argument(parser)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> int:
    options = parse(args)
    arbiter.join(options.turns)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high")
    rows = []
    for batch in options.batch:
        try:
            require(batch >= 1, "batch", batch, "a positive whole number", "change it")
            for steps in options.steps:
                even_times(steps)
            model = ModelConfig.official(options.model, input_size=options.input_size)
            work = Workload(model, batch, options.device, options.vae)
        except UserError as error:
            raise BadInput(f"benchmarks.inference: error: {error}") from None
        ways = list(work.ways(options.network, options.decode, options.precision, options.steps))
        found = measure(work, ways, options.repeats or REPEATS[options.device], options.seconds)
        # what is known stays, whatever happens to the next
        rows += append(found, options)
        print(report(rows[-len(found) :]), flush=True)
    return 1 if any(row.get("failed") for row in rows) else 0


def report(rows: list[dict]) -> str:
    """The ways of one batch as tables, and why some have no time."""
    head = rows[0]
    where = head["gpu"] or f"CPU ({head['cpu']}, {head['threads']} threads)"
    vae = next((row["vae"] for row in rows if "vae" in row), None)
    text = [f"{head['model']}, batch {head['batch']}, latents {head['input_size']}, {where}"]
    text += [f"decoder: {vae}"] if vae else []
    for scope in ("network", "decode", "sample"):
        found = [row for row in rows if row["part"] == scope and row["ms"]]
        if not found:
            continue
        header = [scope, "precision", "steps", "ms", "20 to 80 %", "img/s", "x first", "TFLOP/s", "off", "first call s"]
        lines = [
            [r["variant"], r["precision"], r["steps"] or "-", f"{r['ms']:.2f}", f"{r['ms_20']:.2f} to {r['ms_80']:.2f}",
             f"{r['images_per_second']:.4g}", f"{r['times']['50']:.2f}", f"{r['tflops']:.3g}",
             f"{r['difference']:.1e}" if "difference" in r else "-", f"{r['first_call_seconds']:.1f}"]
            + ([f"{r['share_of_decode']['50']:.0%}", r["decode"]] if scope == "sample" else [])
            for r in found
        ]  # fmt: skip
        text.append(table(header + (["decode's share", "decode"] if scope == "sample" else []), lines))
    untimed = (f"{r['part']} {r['variant']}: not timed: {r['missing']['ms']}" for r in rows if not r["ms"])
    return "\n".join([*text, *dict.fromkeys(untimed)])


if __name__ == "__main__":
    sys.exit(main())
