"""Compile every launch config without a GPU, and report what the compilers say: ``python -m benchmarks.static_report``.

Every operator's configs are compiled for each architecture, and a table shows registers, spills, shared memory,
occupancy, matrix instructions, the waits and single-value conversions of a loop with wgmma, and the width of global
accesses. The exit code is 1 where a config breaks a rule:

- it spills registers, or does not compile;
- it asks for more shared memory than a block may have (99 KB on architectures other than sm_80 and sm_90);
- its elements are of 16 bits and some vector load of theirs moves 2 bytes a thread;
- it is 16-bit attention on sm_90, multiplies matrices, and has no wgmma;
- it is attention's forward in 16 bits on sm_90, of a head dim of the models, and its wgmma are serialised, or their
  loop converts single values or waits for all copies of what it loads. Some are excused of one of these for a reason:
  static/rules.py names them, and the report prints them.

Configs are compiled in 16 bits alone, unless ``--full`` asks for every dtype.

A load counts as a vector load where threads use different addresses. One address for all threads is a scalar, and
loads of other element sizes (the fp32 row statistics of a 16-bit kernel) are listed by argument in the JSON rows.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import time
from pathlib import Path

from .harness.table import table
from .static.occupancy import KB, LIMITS
from .static.rules import judge, problems

_WORK: list = []


def folders() -> dict:
    """The operators' packages that list launch configs, by name."""
    import meanflow_kernels

    names = sorted(m.name for m in pkgutil.iter_modules(meanflow_kernels.__path__) if m.ispkg)
    packages = {name: importlib.import_module(f"meanflow_kernels.{name}") for name in names}
    return {name: package for name, package in packages.items() if hasattr(package, "compile_cases")}


def _row(index: int) -> dict:
    """One launch config compiled: its row, with the rules it breaks under ``problems``."""
    from .static.ptxas import inspect

    folder, arch, case = _WORK[index]
    row = {
        "op": case.op,
        "folder": folder,
        "arch": f"sm_{arch}",
        "dtype": str(case.dtype).removeprefix("torch."),
        "head_dim" if folder == "attention" else "width": case.width,
        "config": case.label,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }
    start = time.perf_counter()
    try:
        row |= inspect(case, arch)
    except Exception as error:  # a config that does not compile is a row of the report, not the end of it
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"compile_seconds": round(time.perf_counter() - start, 2), "problems": problems(row)}


def cases(names: list[str], archs: list[int], *, full: bool) -> list[tuple]:
    """(folder, architecture, CompileCase) of every launch config of the operators ``names``.

    Without ``full`` those of 16 bits alone, what models train in; of an operator that has none, all.
    """
    packages = folders()
    every = [(name, arch, case) for name in names for arch in archs for case in packages[name].compile_cases(arch)]
    narrow = {name for name, _, case in every if case.dtype.itemsize == 2}
    return [row for row in every if full or row[2].dtype.itemsize == 2 or row[0] not in narrow]


def report(work: list[tuple], jobs: int) -> list[dict]:
    """The rows of ``work``, as :func:`cases` lists it, compiled by ``jobs`` processes.

    Raises:
        RuntimeError: TRITON_INTERPRET was set when Triton was imported, and kernels cannot be compiled.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: got 1, wanted it unset; interpreted kernels cannot be compiled: unset it")
    if not work:
        return []
    _WORK[:] = work
    rows: list[dict] = []
    start = time.perf_counter()
    # the cases reach the workers by fork: kernels do not pickle
    with multiprocessing.get_context("fork").Pool(min(jobs, len(work))) as pool:
        for row in pool.imap(_row, range(len(work))):
            rows.append(row)
            _progress(len(rows), len(work), time.perf_counter() - start, row)
    return rows


def _progress(done: int, total: int, seconds: float, row: dict) -> None:
    line = f"[{done}/{total}] {seconds:4.0f} s  {row['op']} {row['arch']} {row['dtype']} {row['config']}"
    if sys.stderr.isatty():
        # one line that rewrites itself
        print(f"\r{line[:100]:100}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done % 25 == 0 or done == total:
        print(line, file=sys.stderr, flush=True)


_HEADER = (
    "op arch dtype size config warps regs spill_B shared_KB occupancy wgmma waits convert mma load_B store_B problems"
).split()


def _cells(row: dict) -> list[object]:
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(row["dtype"], row["dtype"])
    size = row.get("head_dim", row.get("width"))
    cells = [row["op"], row["arch"], dtype, size, row["config"], row["num_warps"]]
    if "error" in row:
        return cells + ["-"] * (len(_HEADER) - len(cells) - 1) + row["problems"]
    cells += [row["registers"], row["spill_bytes"], f"{row['shared_bytes'] / KB:.1f}", f"{row['occupancy']:.0%}"]
    cells += [row["wgmma"], row.get("loop_wgmma_waits", "-"), row.get("loop_conversions", "-")]
    cells += [row["mma"] or row["tcgen05"]]
    cells += [row[f"narrowest_global_{kind}_bytes"] or "-" for kind in ("load", "store")]
    return [*cells, "; ".join(row["problems"])]


def main(argv: list[str] | None = None) -> int:
    """Print the report; 1 where a config breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    known = [f"sm_{arch}" for arch in LIMITS]
    parser.add_argument("--arch", nargs="+", default=known, metavar="SM", help=f"default: {' '.join(known)}")
    parser.add_argument("--op", nargs="+", metavar="OP", help="operators to compile (default: all that have kernels)")
    parser.add_argument("--full", action="store_true", help="every dtype, not those of 16 bits alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(argv)
    archs = [int(a.removeprefix("sm_")) for a in options.arch]
    if unknown := set(archs) - set(LIMITS):
        parser.error(f"--arch: got sm_{min(unknown)}, wants some of {', '.join(known)}")
    names = options.op or list(folders())
    if unknown := set(names) - set(folders()):
        parser.error(f"--op: got {min(unknown)}, wants some of {', '.join(folders())}")
    rows = report(cases(names, archs, full=options.full), options.jobs)
    for row in rows:
        judge(row)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(_HEADER, [_cells(row) for row in rows]))
    broken = [row for row in rows if row["problems"]]
    print(f"\n{len(rows)} configs, {len(broken)} with a problem")
    for line in sorted({row["excused"] for row in rows} - {""}):
        print(f"excused: {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
