"""Time the loader: latents a second from a cache in the page cache, read at random, as training reads them.

python -m benchmarks.loader                          4x32x32, fp16, batch 256, with prefetching
python -m benchmarks.loader --size 64 --step-ms 900  ImageNet-512's latents; what waiting costs of a step of 900 ms
python -m benchmarks.loader --cache LATENTS          a cache of your own

Every row of a batch is checked against the cache once before anything is timed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from meanflow.data.cache import Builder
from meanflow.data.dataset import Latents, Order
from meanflow.errors import UserError
from meanflow.training.prefetch import Prefetcher

from .harness.arguments import BadInput, finite, positive
from .harness.clock import quantiles
from .harness.environment import environment
from .harness.table import table

CHANNELS, CLASSES = 4, 1000


def make_cache(folder: Path, rows: int, size: int, dtype: str, shard_rows: int) -> None:
    """A cache of random numbers."""
    job = {"count": rows, "shard_rows": shard_rows, "latent_shape": (CHANNELS, size, size), "dtype": dtype,
           "flipped": False, "classes": None, "pixels": "symmetric"}  # fmt: skip
    builder, rng = Builder(folder, job), np.random.default_rng(0)
    builder.begin()
    for shard in range(builder.shards):
        shape = (len(builder.members(shard)), 1, 2, CHANNELS, size, size)
        builder.put(shard, rng.random(shape, np.float32), rng.integers(0, CLASSES, shape[0]), [], {})
    builder.finish()


def check(dataset: Latents, indices: np.ndarray) -> None:
    """Raise SystemExit unless a batch holds the rows that its shards hold."""
    batch, rows = dataset.read(indices), dataset.cache.manifest["shards"][0]["rows"]
    for i, index in enumerate(indices.tolist()):
        shard = np.load(dataset.cache.folder / f"shard_{index // rows:05d}.npy", mmap_mode="r", allow_pickle=False)
        row = shard[index % rows, 0]
        if (row[0] != batch.mean[i].numpy()).any() or (row[1] != batch.std[i].numpy()).any():
            raise SystemExit(f"row {index} is another one, nothing was timed")


def measure(dataset: Latents, batch: int, steps: int, ahead: int, repeats: int) -> list[float]:
    """Latents a second of each repeat; ahead 0 reads without a thread."""
    order, rates = Order(len(dataset), batch, 0, True), []

    def make(step: int):
        return dataset.read(order.indices(step))

    for repeat in range(repeats):
        first = repeat * steps
        start = time.perf_counter()
        if ahead:
            with Prefetcher(make, first, ahead) as data:
                for step in range(first, first + steps):
                    data.get(step)
                seconds = time.perf_counter() - start
        else:
            for step in range(first, first + steps):
                make(step)
            seconds = time.perf_counter() - start
        rates.append(steps * batch / seconds)
    return rates


def waiting(dataset: Latents, batch: int, step_ms: float, steps: int = 20) -> float:
    """Share of a step of so many milliseconds that is spent waiting for data. The step only sleeps."""
    order = Order(len(dataset), batch, 0, True)
    with Prefetcher(lambda step: dataset.read(order.indices(step)), 0) as data:
        data.get(0)
        before, start = data.wait_seconds, time.perf_counter()
        for step in range(1, steps + 1):
            time.sleep(step_ms / 1e3)
            data.get(step)
        return (data.wait_seconds - before) / (time.perf_counter() - start)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--cache", type=Path, default=None, help="a cache to read (default: one of random numbers)")
    parser.add_argument("--count", type=int, default=32_768, help="rows of that one (default 32768)")
    parser.add_argument("--size", type=int, default=32, help="side of its latents (default 32)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--shard-rows", type=int, default=1024, help="its rows a shard (default 1024)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="batches a repeat (default 100)")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--step-ms", type=finite, default=100.0, help="for the share of waiting (default 100)")
    parser.add_argument("--rows", type=Path, default=None, help="append the rows to this file of JSON lines")
    parser.add_argument("--commit", default=None, help="of a tree that is no git checkout")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cache or Path(temporary) / "latents"
        try:
            if options.cache is None:
                make_cache(folder, options.count, options.size, options.dtype, options.shard_rows)
            dataset = Latents(str(folder), CLASSES)
        except UserError as error:
            raise BadInput(f"benchmarks.loader: error: {error}") from None
        check(dataset, Order(len(dataset), options.batch, 1, True).indices(0))
        for shard in folder.glob("shard_*.npy"):
            shard.read_bytes()  # into the page cache
        rows = []
        for ahead in (0, 3):
            low, rate, high = quantiles(measure(dataset, options.batch, options.steps, ahead, options.repeats))
            rows.append({"op": "loader", "ahead": ahead, "latents_per_second": rate, "rate_20": low, "rate_80": high,
                         "gbps": rate * 2 * int(np.prod(dataset.shape)) * dataset.cache.dtype.itemsize / 1e9,
                         "shape": list(dataset.shape), "dtype": dataset.cache.manifest["dtype"],
                         "batch": options.batch, "count": len(dataset), "shards": len(dataset.cache.manifest["shards"]),
                         "samples": options.repeats} | environment("cpu", options.commit))  # fmt: skip
        share = waiting(dataset, options.batch, options.step_ms)
    rows[-1] |= {"step_ms": options.step_ms, "wait_share": share}
    if options.rows:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(report(rows))


def report(rows: list[dict]) -> str:
    head = rows[-1]
    lines = [
        [f"{r['ahead']} ahead" if r["ahead"] else "no thread", f"{r['latents_per_second']:,.0f}",
         f"{r['rate_20']:,.0f} to {r['rate_80']:,.0f}", f"{r['gbps']:.3g}"]
        for r in rows
    ]  # fmt: skip
    shape = "x".join(map(str, head["shape"]))
    title = (f"{shape} {head['dtype']} mean and std, {head['count']:,} rows in {head['shards']} shards, batch "
             f"{head['batch']}, CPU ({head['cpu']}, {head['threads']} threads)")  # fmt: skip
    wait = f"Waiting for data: {head['wait_share']:.2%} of a step of {head['step_ms']:g} ms that leaves the CPU idle."
    return "\n".join([title, table(["loader", "latents/s", "20 to 80 %", "GB/s"], lines), wait])


if __name__ == "__main__":
    main()
