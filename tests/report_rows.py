"""Rows of benchmarks, all made up, and a reader of the report made of them."""

from html.parser import HTMLParser

GPU = {
    "device": "cuda", "gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0",
    "commit": "0123456789abcdef0123456789abcdef01234567", "date": "2030-01-02T03:04:05+00:00",
    "sm_mhz": 1980, "memory_mhz": 3201, "throttle_bits": 0,
}  # fmt: skip
CPU = {
    "device": "cpu", "gpu": None, "driver": None, "torch": "2.13.0", "triton": "3.7.1", "commit": "feedbeef-dirty",
    "date": "2030-02-03T00:00:00+00:00", "cpu": "made-up", "threads": 2,
}  # fmt: skip
STEP = {
    "model": "XL/2", "batch": 32, "tokens": 256, "precision": "bf16", "omega": 1.0, "kappa": 0.5,
    "interval": [0.0, 1.0], "share": 0.25, "samples": 30,
}  # fmt: skip


def quantiles(ms: float) -> dict:
    return {"ms": ms, "ms_20": 0.9 * ms, "ms_80": 1.25 * ms}


def step(variant: str, ms: float, where: dict = GPU, **columns) -> dict:
    row = STEP | quantiles(ms) | {"variant": variant, "first_step_seconds": 12.0, "times": {}}
    row |= {"gradient_against": None if variant == "naive" else "naive"}
    return row | {"images_per_second": 32e3 / ms} | where | columns


def untimed(variant: str, why: str, **columns) -> dict:
    return STEP | {"kind": "step", "variant": variant, "ms": None, "missing": {"ms": why}} | GPU | columns


def kernel(op: str, variant: str, ms: float, *, flops: float, moved: float, shape: str = "XL/2 32x256x16x72") -> dict:
    name = {"op": op, "shape": shape, "dtype": "bfloat16", "variant": variant, "call": "dual"}
    bound = {"bound": "gemm", "ceiling": 800.0} if flops else {"bound": "copy", "ceiling": 4000.0}
    row = name | quantiles(ms) | {"flops": flops, "bytes": moved, "host_ms": 0.05, "error": 2e-3, "error_dot": 3e-3}
    # a rate that is wrong on purpose: the report takes FLOPs, bytes and time
    return row | bound | {"tflops": 1.0, "gbps": 1.0} | GPU


def tuned(config: str, ms: float | None, *, shipped: bool = False, gain: dict | None = None) -> dict:
    row = {"kind": "tune", "op": "f", "shape": "XL/2 mixed", "dtype": "bfloat16", "table": "f/config.py, FORWARD"}
    times = quantiles(ms) if ms else {"ms": None}
    return GPU | row | times | {"config": config, "entry": f"Config({config})", "shipped": shipped, "gain": gain}


def accounts() -> dict:
    parts = {"guidance": 1.25e12, "primal": 2e12, "tangent": 0.5e12, "backward": 4e12}
    row = {"preset": "imagenet-b4", "batch": 256, "precision": "bf16", "forward_flops": 2e12}
    row |= {"parts": {name: {"flops": flops} for name, flops in parts.items()}, "step_in_forwards": 3.875}
    row |= {"step_in_forwards_unpadded": 3.75, "saved_bytes": 12e9, "floor_ms": 9.5}
    row["floor"] = {"gpu": "NVIDIA H200", "gemm_tflops": 800.0, "gemm_source": "measured", "copy_gbps": 4000.0}
    row["floor"]["copy_source"] = "datasheet"
    return row | {"environment": CPU}


def made_up() -> list[dict]:
    """Rows of every kind."""
    found = [
        step("naive", 400.0, peak_bytes=40 * 2**30, mfu=0.123, needed_flops=48.7e12),
        step("naive-compiled", 200.0, peak_bytes=32 * 2**30, times={"naive": {"20": 1.9, "50": 2.0, "80": 2.2}}),
        step("ours", 125.0, peak_bytes=20 * 2**30, reserved_bytes=24 * 2**30, times={
            "naive": {"20": 3.0, "50": 3.25, "80": 3.5}, "naive-compiled": {"20": 1.5, "50": 1.6, "80": 1.7},
        }, missing={"joules_per_image": "no permission"}),
        step("ours-captured", 100.0),
        step("naive", 90.0, model="B/4", batch=256, tokens=64, kappa=0.0),
        step("ours", 30.0, model="B/4", batch=256, tokens=64, kappa=0.0),
        step("naive", 4000.0, CPU, model="S/8", batch=4, tokens=16, precision="fp32"),
        step("ours-eager", 2500.0, CPU, model="S/8", batch=4, tokens=16, precision="fp32"),
    ]  # fmt: skip
    compared = ["ours", "ours-no-kernels", "ours-eager", "ours-whole-batch"]
    slower = {"20": 0.4, "50": 0.5, "80": 0.8}
    found += [
        untimed("ours-eager", "out of memory", compared=compared),
        step("ours", 126.0, compared=compared),
        step("ours-no-kernels", 252.0, compared=compared, times={"ours": slower}, peak_bytes=30 * 2**30),
        untimed("naive", "no such driver", model="B/4", batch=64, tokens=64),
    ]
    twice = STEP | GPU | {"kind": "regression", "variant": "ours", "ms": 125.0, "base_ms": 124.0, "turns": 40}
    found += [
        twice | {"base": "itself", "ratio": {"20": 0.99, "50": 1.004, "80": 1.02}},
        twice | {"base": "itself", "batch": 8, "ratio": {"20": 1.01, "50": 1.02, "80": 1.03}},
        twice | {"base": "main", "ratio": {"20": 0.8, "50": 0.9, "80": 0.95}},
    ]
    found += [
        kernel("attention", "ours", 0.5, flops=2e11, moved=1e9),
        kernel("attention", "sdpa math, func.jvp", 4.0, flops=2e11, moved=1e9),
        kernel("linear", "ours", 0.25, flops=1.5e11, moved=2e8),
        kernel("adaln", "ours", 0.1, flops=0, moved=3e8),
        kernel("adaln", "func.jvp, compiled", 0.3, flops=0, moved=3e8),
        kernel("silu", "ours", 0.01, flops=0, moved=3e7, shape="B/4 256x64x12x64"),
    ]
    gains = {"20": 1.9, "50": 2.0, "80": 2.1}
    found += [
        tuned("old", 2.0, shipped=True, gain=dict.fromkeys(gains, 1.0)),
        tuned("new", 1.0, gain=gains),
        tuned("worse", 4.0, gain=dict.fromkeys(gains, 0.5)),
        GPU | tuned("big", None) | {"missing": {"ms": "spills: [8]"}},
    ]
    parts = {"guidance": 20.0, "primal": 30.0, "tangent": -1.0, "backward": 60.0, "optimizer": 11.0}
    kinds = {"GEMM": 70.0, "attention": 10.0, "pointwise": 30.0, "idle": 10.0}
    cut = STEP | GPU | {"kind": "breakdown"}
    found += [
        cut | {"variant": "ours", "by": "part", "ms": parts},
        cut | {"variant": "ours", "by": "kind", "ms": kinds, "trace": "step-xl2.json"},
    ]
    found.append(cut | {"variant": "naive", "by": "kind", "ms": {"GEMM": 200.0, "pointwise": 200.0}})
    name = {"kernel": "nvjet", "activity": "kernel", "kernel_kind": "GEMM"}
    found.append(cut | name | {"kind": "step-kernel", "variant": "ours", "ms": 2.0, "launches": 4.0, "us": 500.0,
                               "wall_ms": 2.5})  # fmt: skip
    for variant, slow in (("naive", 4), ("ours", 1)):
        batches = [
            step(variant, slow * b, batch=b, peak_bytes=b * 2**28, axis="batch", tokens=256) for b in (8, 16, 32)
        ]
        tokens = [step(variant, slow * n / 4, axis="tokens", tokens=n) for n in (64, 256, 1024, 4096)]
        models = [step(variant, slow * ms, model=m, axis="model", tokens=256) for m, ms in (("B/2", 30), ("XL/2", 125))]
        found += batches + tokens + models
    full = step("naive", 1.0, axis="tokens", tokens=16384, missing={"ms": "out of memory"})
    found.append({name: value for name, value in full.items() if not name.startswith("ms")})
    moved = {"op": "adamw_ema", "model": "XL/2", "parameters": 676_000_000, "bytes": 24e9, "copy_gbps": 4000.0} | GPU
    ratio = {"times_torch": {"20": 1.4, "50": 1.5, "80": 1.6}}
    found += [moved | quantiles(8.0) | {"implementation": "native"} | ratio]
    found += [moved | quantiles(12.0) | {"implementation": "torch", "times_torch": {"20": 1.0, "50": 1.0, "80": 1.0}}]
    sampled = GPU | {"kind": "inference", "model": "XL/2", "batch": 64, "input_size": 32, "tokens": 256}
    for part, variant, steps, ms in (("network", "eager", 1, 40.0), ("network", "compiled", 2, 50.0),
                                     ("decode", "plain", None, 200.0), ("sample", "compiled", 1, 160.0)):  # fmt: skip
        row = sampled | quantiles(ms) | {"part": part, "variant": variant, "precision": "bf16", "steps": steps}
        row |= {"images_per_second": 64e3 / ms, "times": {"20": 1.0, "50": 1.5, "80": 2.0}, "decode": "plain"}
        row |= {"share_of_decode": {"20": 0.7, "50": 0.75, "80": 0.8}, "vae": "random", "difference": 1.25e-3}
        found.append(row)
    found.append(sampled | {"part": "decode", "variant": "tiling", "precision": "fp32", "steps": None, "ms": None,
                            "missing": {"ms": "no larger than a tile"}})  # fmt: skip
    projected = {"preset": "imagenet-xl2", "gpu": "NVIDIA H200", "gpus": 8, "hours": 1234.0, "measured_ms": 125.0}
    found += [accounts(), projected | {"note": "240 epochs of 5,004 steps"} | GPU]
    beside = {"bench": "public kernels", "note": "as it is", "ceiling": None, "missing": {"ceiling": "not measured"}}
    found += [
        kernel("attention", "ours", 0.8, flops=2e11, moved=1e9) | beside,
        kernel("attention", "theirs", 0.4, flops=2e11, moved=1e9) | beside | {"peer": "they/theirs"},
    ]
    product = GPU | {"kind": "product", "step": "XL/2", "layer": "fc1", "m": 8192, "k": 1152, "n": 4608}
    found += [product | {"pass": name, "dtype": "bfloat16", "tflops": 700.0} for name in ("forward", "backward")]
    failed = {"kind": "part", "part": "step-xl2", "outcome": "failed", "seconds": 3.0, "rows": 0, "log": "logs/x.log"}
    return [*found, failed | GPU | {"tail": ["Traceback", "RuntimeError: <out of luck>"]}]


class Reader(HTMLParser):
    """Tables as lists of rows of cells, every address, and what kinds of elements there are."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.captions, self.addresses, self.tags, self.sections = [], [], [], [], {}
        self._into = self._section = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.addresses += [value for name, value in attributes.items() if name in ("href", "src", "xlink:href")]
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = []
        elif tag == "table":
            self.tables.append([])
            self.sections[self._section].append(self.tables[-1])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._into = "cell"
        elif tag == "caption":
            self.captions.append("")
            self._into = "caption"

    def handle_endtag(self, tag):
        if tag in ("td", "th", "caption"):
            self._into = None

    def handle_data(self, data):
        if self._into == "cell":
            self.tables[-1][-1][-1] += data
        elif self._into == "caption":
            self.captions[-1] += data

    def cell(self, section: str, column: str, **columns: str) -> str:
        """The cell of a section's only row with these cells."""
        found = []
        for head, *lines in self.sections[section]:
            for line in (dict(zip(head, cells, strict=True)) for cells in lines):
                if columns.items() <= line.items() and column in line:
                    found.append(line[column])
        assert len(found) == 1, (section, column, columns, found)
        return found[0]
