"""Project the paper's recipes onto several GPUs from measured steps of one: never a measurement.

python -m benchmarks.step --preset imagenet-xl2 --batch 32 --compare ours --rows rows.jsonl      (measures)
python -m benchmarks.projection rows.jsonl                                                       (projects hours)
python -m benchmarks.projection rows.jsonl --gpus 8,16,64,128 --card H100 H200                   (and how it scales)

ROWS are files of JSON lines or folders of them; of a recipe and variant the newest row of a card counts.

Without --gpus a recipe takes its steps on as many GPUs as fill its batch with the measured one. Data parallel GPUs sum
fp32 gradients by a ring: 2 (n - 1) / n times the parameters' bytes through each GPU's link. The shorter time
hides that behind the backward, the longer one adds it; the real one lies between if nothing else (data, the slowest
rank) is in the way.

With --gpus the recipe's batch is cut into so many parts. Of a measured step with the nearest number of samples on one
GPU, the counted bytes of gradients and weights at the rate of a copy are set aside; the rest is scaled by the samples.
Then come back what a process of each engine moves of weights (its part alone where they are sharded) and what it
exchanges (`counting.exchange`): the shorter step hides it behind the passes that can, as far as they last, the longer
one hides nothing. Efficiency is the images of a GPU in a second over those of the measured step.

Another card of --card is projected from the measured one by datasheets: the least time of the step's products, by the
rate that was measured, in the ratio of the peaks, and all else in that of the memory.

Not counted, and each makes a step longer: waiting for the slowest process, or for the host where the step is not
captured (fsdp), a GPU that few samples do not fill, the padding of fewer than 8 samples.
"""

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from meanflow.errors import UserError, require
from meanflow.model.build import build_net
from meanflow.presets import PRESETS, preset
from meanflow.training.peaks import PEAKS

from .counting import exchange
from .counting.accounts import META, MetaStep, count
from .counting.exchange import ENGINES, Links, Weights
from .counting.floor import find_rates
from .harness.arguments import BadInput, finite, positive
from .harness.rows import newest, read
from .harness.table import markdown_table, table

LINKS = Links()
CARDS = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
FEWEST = 2
"""Samples of a GPU at least: fewer are no batch to plan."""


def parameter_bytes(name: str) -> int:
    """Bytes of the parameters of a preset's network, in fp32."""
    with META:
        return sum(p.nbytes for p in build_net(preset(name).model).parameters())


def usable(rows: list[dict]) -> list[dict]:
    """The step rows that a recipe's time can be projected from: ours, on a GPU, with a batch that divides the recipe's.

    A variant that did not fit is a row without a time, and the same step of another preset is no row of this one.
    """
    found = [r for r in rows if r.get("preset") and r.get("gpu") and r.get("ms")]
    found = [r for r in found if r["variant"].startswith("ours") and preset(r["preset"]).train.batch % r["batch"] == 0]
    return newest(found, lambda r: (r["preset"], r["gpu"], r["batch"], r["variant"]))[0]


def project(row: dict, link_gbps: float) -> dict:
    """Hours of a whole recipe from a measured step of its model and objective."""
    train = preset(row["preset"]).train
    gpus, steps = train.batch // row["batch"], train.steps
    exchange_ms = 2 * (gpus - 1) / gpus * parameter_bytes(row["preset"]) / link_gbps / 1e6
    hours = [steps * ms / 3.6e6 for ms in (row["ms"], row["ms"] + exchange_ms)]
    return {
        "kind": "projection",
        "preset": row["preset"],
        "gpu": row["gpu"],
        "variant": row["variant"],
        "gpus": gpus,
        "batch": row["batch"],
        "steps": steps,
        "measured_ms": row["ms"],
        "exchange_ms": exchange_ms,
        "link_gbps": link_gbps,
        "hours": hours[1],
        "hours_hidden": hours[0],
        "gpu_hours": gpus * hours[1],
        "note": "projected from a measured step on one GPU; gradient exchange added, none hidden",
    }


# --- over numbers of GPUs ---


def samples_of(batch: int, gpus: int, links: Links) -> int:
    """Samples of each GPU in a step of so many.

    Raises:
        UserError: for machines that are not full, GPUs that do not divide the batch, or that leave too few samples.
    """
    links.check(gpus)
    require(batch % gpus == 0, "gpus", gpus, f"a divisor of the batch {batch}", "take a power of two")
    wanted = f"at most {batch // FEWEST}, which leave each {FEWEST} samples of the batch {batch}"
    require(batch // gpus >= FEWEST, "gpus", gpus, wanted, "take fewer")
    return batch // gpus


def nearest(rows: list[dict], samples: int) -> dict:
    """The row whose batch is nearest to so many samples, by their ratio; the shortest step of several."""
    return min(rows, key=lambda r: (abs(math.log(r["batch"] / samples)), r["ms"]))


@functools.cache  # for each card
def counts(name: str) -> tuple[Weights, int, float]:
    """A recipe's weights, the forward passes of its step, and the FLOPs of a sample's backward."""
    config = preset(name)
    # of all heads that are trained
    forward = count(MetaStep(config).flow_matching_loss)
    backward = (2 * forward.linear + 2.5 * forward.attention) / config.train.batch
    return exchange.weights(config), exchange.forwards(config), backward


class Scaling:
    """The step of a recipe on several GPUs, from measured steps on one card.

    Args:
        rows: `usable` ones of a recipe and card. card: which the projection is for.
    """

    def __init__(self, rows: list[dict], card: str, links: Links):
        self.rows, self.card, self.links = rows, card, links
        self.name, measured_on = rows[0]["preset"], rows[0]["gpu"]
        self.config, (self.weights, self.forwards, self.backward_flops) = preset(self.name), counts(self.name)
        self.gemm_tflops, self.copy_gbps = (rate.value for rate in find_rates(measured_on))
        # how many times as long products and copies take
        self.products, self.copies = 1.0, 1.0
        if card != measured_on:
            known = "one of " + ", ".join(PEAKS)
            require(measured_on in PEAKS, "gpu", measured_on, known, "its rows are projected without --card")
            old, new = PEAKS[measured_on], PEAKS[card]
            self.products, self.copies = old.tflops / new.tflops, old.gbps / new.gbps

    def _moved_ms(self, *process) -> float:
        """Time in which a process moves its gradients and weights, on the card that was measured."""
        return exchange.moved(self.weights, *process) / self.copy_gbps / 1e6

    def _passes_ms(self, row: dict) -> float:
        """What is left of a measured step without that, on this card."""
        products = row["needed_flops"] / self.gemm_tflops / 1e9
        return products * self.products + (row["ms"] - self._moved_ms() - products) * self.copies

    def step(self, gpus: int, engine: str) -> dict:
        """The row of a projected step, with its recipe's hours.

        Raises:
            UserError: as :func:`samples_of`.
        """
        samples = samples_of(self.config.train.batch, gpus, self.links)
        row = nearest(self.rows, samples)
        share = samples / row["batch"]
        alone = self._passes_ms(row) + self._moved_ms() * self.copies
        passes = self._passes_ms(row) * share
        update = (self._moved_ms(engine, gpus) if gpus > 1 else self._moved_ms()) * self.copies
        sizes = exchange.exchanged(engine, self.weights, gpus, self.forwards)
        times = {name: self.links.ms(name, size, gpus) for name, size in sizes.items()}
        exchange_ms = sum(times.values())
        # zero1 gathers what the step has made, and the next one waits for it
        early = exchange_ms - (times.get("gather", 0.0) if engine == "zero1" else 0.0)
        behind = passes * (1.0 if engine == "fsdp" else row["batch"] * self.backward_flops / row["needed_flops"])
        longest = passes + update + exchange_ms
        shortest = longest - min(early, behind)
        hours = self.config.train.steps / 3.6e6
        return {
            "kind": "projection",
            "preset": self.name,
            "gpu": self.card,
            "variant": row["variant"],
            "parallel": engine,
            "gpus": gpus,
            "batch": samples,
            "steps": self.config.train.steps,
            "measured_gpu": row["gpu"],
            "measured_batch": row["batch"],
            "measured_ms": row["ms"],
            "exchange_bytes": sizes,
            "sent_bytes": sum(self.links.sent(name, size, gpus) for name, size in sizes.items()),
            "exchange_ms": exchange_ms,
            "nvlink_gbps": self.links.nvlink,
            "network_gbps": self.links.network,
            "step_ms": [shortest, longest],
            "efficiency": [share * alone / longest, share * alone / shortest],
            "hours": hours * longest,
            "hours_hidden": hours * shortest,
            "gpu_hours": gpus * hours * longest,
            "note": NOTE,
        }


NOTE = "measured: a step on one GPU; counted: bytes; supposed: the links' rates; projected: all else"


def scale(
    rows: list[dict],
    gpus: list[int],
    cards: Sequence[str] = (),
    engines: Sequence[str] = ENGINES,
    links: Links = LINKS,
) -> tuple[list[dict], list[str]]:
    """The projected steps of every recipe that has `usable` rows, and why others are not projected.

    Args:
        cards: their full names; none: those of the rows.
    """
    found, refused = [], {}
    for name in [name for name in PRESETS if any(row["preset"] == name for row in rows)]:
        fitting = []
        for number in gpus:
            try:
                samples_of(preset(name).train.batch, number, links)
                fitting.append(number)
            except UserError as error:
                refused.setdefault(str(error), []).append(name)
        measured: dict[str, list[dict]] = {}
        for row in rows:
            if row["preset"] == name:
                measured.setdefault(row["gpu"], []).append(row)
        for card in cards or measured:
            # its own rows where it has some
            scaling = Scaling(measured.get(card) or next(iter(measured.values())), card, links)
            found += [scaling.step(number, engine) for number in fitting for engine in engines]
    return found, [f"{why} ({', '.join(names)})" for why, names in refused.items()]


def span(values: list[float], form: str = ".1f") -> str:
    """Two bounds, or one where they read alike."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in values))


def short(card: str) -> str:
    """A card's name as people say it."""
    return next((name for name, full in CARDS.items() if full == card), card)


def text(rows: list[dict], links: Links) -> str:
    """The projected steps as a table, with what they rest on."""
    header = "recipe,GPUs,samples a GPU,measured ms,of,engine,GB of tensors (counted),GB sent (counted)".split(",")
    header += ["exchange, ms *", "step, ms *", "hours *", "efficiency *"]
    lines = [
        [r["preset"], f"{r['gpus']} {short(r['gpu'])}", r["batch"], f"{r['measured_ms']:.1f}",
         f"{r['measured_batch']}, {short(r['measured_gpu'])}", r["parallel"], sizes_words(r),
         f"{r['sent_bytes'] / 1e9:.2f}", f"{r['exchange_ms']:.1f}",
         span(r["step_ms"]), span([r["hours_hidden"], r["hours"]]), span(r["efficiency"], ".0%")]
        for r in rows
    ]  # fmt: skip
    return f"PROJECTED, not measured, from measured steps on one GPU\n{table(header, lines)}\n{notes(links)}"


def notes(links: Links) -> str:
    return (
        "Measured: a step of so many samples on one GPU. Counted: the tensors that a step exchanges, and what a GPU "
        f"sends of them. Supposed: {links.nvlink:g} GB/s of a GPU's NVLink within {links.machine} GPUs, "
        f"{links.network:g} GB/s of its network between those. PROJECTED (*): all else, from as much of the exchange "
        "hidden as can be to none."
    )


def sizes_words(row: dict) -> str:
    found = {name: f"{size / 1e9:.2f}" for name, size in row["exchange_bytes"].items()}
    return ", ".join(f"{name} {size}" for name, size in found.items() if size != "0.00") or "nothing"


def markdown(rows: list[dict]) -> str:
    """The same in Markdown: a line for each recipe, card and number of GPUs, an engine a column."""
    engines = list(dict.fromkeys(row["parallel"] for row in rows))
    header = ["recipe", "GPUs", "samples a GPU", "measured"]
    header += [f"{name}: GB sent, ms a step *, hours *" for name in engines] + [f"efficiency, {engines[0]} *"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["preset"], row["gpus"], row["gpu"]), []).append(row)
    lines = []
    for (name, gpus, card), (first, *_) in groups.items():
        measured = f"{first['measured_ms']:.1f} ms for {first['measured_batch']}, {short(first['measured_gpu'])}"
        lines.append([f"`{name}`", f"{gpus} {short(card)}", str(first["batch"]), measured])
        for row in groups[name, gpus, card]:
            hours = span([row["hours_hidden"], row["hours"]])
            lines[-1].append(f"{row['sent_bytes'] / 1e9:.2f}; {span(row['step_ms'])}; {hours}")
        lines[-1].append(span(first["efficiency"], ".0%"))
    return f"{markdown_table(header, lines)}\n\n{notes(LINKS)}"


def sentence(rows: list[dict], name: str, card: str) -> str:
    """The hours of a recipe on a card's GPUs by each engine."""
    found = [row for row in rows if (row["preset"], short(row["gpu"])) == (name, card)]
    words = [f"{span([row['hours_hidden'], row['hours']], '.0f')} ({row['parallel']})" for row in found]
    return (
        f"PROJECTED, no such run was made: `{name}` on {found[0]['gpus']} {card} in {', '.join(words)} hours, from as "
        "much of the exchange hidden as can be to none ([several GPUs](benchmarks/README.md#several-gpus-projected))."
    )


# --- the command ---


def numbers(text: str) -> list[int]:
    """Parse 8,16,64."""
    return [positive(each) for each in text.split(",")]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.projection", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("measured", nargs="+", type=Path, metavar="ROWS",
                        help="rows that benchmarks.step --preset wrote on a GPU")  # fmt: skip
    parser.add_argument("--link-gbps", type=finite, default=LINKS.nvlink,
                        help=f"GB/s of a GPU's NVLink, each way ({LINKS.nvlink:g})")  # fmt: skip
    parser.add_argument("--gpus", type=numbers, default=None, metavar="N,N,...", help="how a step scales to so many")
    parser.add_argument("--card", nargs="+", choices=CARDS, default=[], help="which GPUs (default: that of the rows)")
    parser.add_argument("--parallel", nargs="+", choices=ENGINES, default=list(ENGINES), help="engines (default all)")
    parser.add_argument("--network-gbps", type=finite, default=LINKS.network,
                        help=f"GB/s of a GPU's network between machines, each way ({LINKS.network:g})")  # fmt: skip
    parser.add_argument("--machine", type=positive, default=LINKS.machine, help=f"GPUs of one ({LINKS.machine})")
    parser.add_argument("--rows", type=Path, default=None, help="append the projections to this file of JSON lines")
    options = parser.parse_args(args)
    refused = []
    try:
        links = Links(options.link_gbps, options.network_gbps, options.machine)
        steps = usable(read(options.measured).by_kind["step"])
        if options.gpus:
            cards = [CARDS[name] for name in options.card]
            # what a step needs was not written down at first
            steps = [row for row in steps if row.get("needed_flops")]
            rows, refused = scale(steps, options.gpus, cards, options.parallel, links)
        else:
            rows = [project(row, links.nvlink) for row in steps]
    except UserError as error:
        raise BadInput(f"benchmarks.projection: error: {error}") from None
    if not steps:
        raise BadInput(
            f"ROWS: got {', '.join(map(str, options.measured))} without a step of a preset on a GPU, wanted one; "
            "run benchmarks.step --preset imagenet-xl2 --batch 32 --compare ours --rows FILE on a GPU"
        )
    if options.rows:
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if options.gpus:
        print(*([text(rows, links)] if rows else []), *(f"not projected: {why}" for why in refused), sep="\n")
        return
    lines = [
        [r["preset"], f"{r['gpus']} x {r['gpu']}", f"{r['measured_ms']:.1f}", f"{r['exchange_ms']:.1f}",
         f"{r['hours_hidden']:.1f} to {r['hours']:.1f}", f"{r['gpu_hours']:.0f}"]
        for r in rows
    ]  # fmt: skip
    print("PROJECTED, not measured, from a measured step on one GPU")
    print(table(["recipe", "GPUs", "measured ms", "exchange ms", "hours", "GPU-hours"], lines))


if __name__ == "__main__":
    main()
