"""Compile one launch config for an NVIDIA architecture, with no GPU, and read what the compiler says of it.

A case is a ``meanflow_kernels.launch.CompileCase``, as an operator's ``compile_cases(arch)`` lists them.
"""

import contextlib
import io
import re
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from .occupancy import LIMITS, occupancy
from .ptx import TMA, UNKNOWN, count, global_accesses
from .sass import disassemble, wgmma_loop

_BITS = re.compile(r"\d+$")


def _compile(case, source, arch: int) -> tuple[triton.compiler.CompiledKernel, str]:
    """The compiled kernel, and what ptxas -v said while it was compiled."""
    log = io.StringIO()
    # a fresh cache: a kernel out of Triton's own cache would come without the words of ptxas
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.launch.options)
    return kernel, log.getvalue()


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas -v of triton {triton.__version__} said nothing that matches {pattern!r}:\n{log}")
    return int(found[1])


def _narrowest(widths: dict[str, int], kinds: dict[str, str], dtype: torch.dtype) -> int | None:
    """The narrowest access to elements of the size of ``dtype``, of unknown origin, or by TMA; else of all."""
    chosen = []
    for name, width in widths.items():
        if name in (TMA, UNKNOWN) or int(_BITS.search(kinds[name])[0]) == 8 * dtype.itemsize:
            chosen.append(width)
    return min(chosen or widths.values(), default=None)


def inspect(case, arch: int) -> dict:
    """Registers, spills, shared memory, occupancy, matrix instructions and global access widths of one case.

    ``global_loads`` and ``global_stores`` hold the narrowest vector access of each argument in bytes a thread.
    ``narrowest_global_load_bytes`` is the narrowest of those whose elements have the size of the case's dtype (of all,
    where none has): the fp32 row statistics of a 16-bit kernel are not in it, nor are scalars (one address for all
    threads) where the kernel loads anything else. Cases with wgmma have the counts of their loop (sass.py) too.
    """
    source = case.source()
    kernel, log = _compile(case, source, arch)
    ptx = kernel.asm["ptx"]
    registers = _number(r"Used (\d+) registers", log)
    # constexprs are no parameters of the compiled kernel
    kinds = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
    arguments = [name if kind.startswith("*") else "" for name, kind in kinds.items()]
    loads, stores, scalars = {}, {}, {}
    for access in global_accesses(ptx, arguments):
        widths = scalars if access.is_scalar else stores if access.is_store else loads
        widths[access.argument] = min(access.width, widths.get(access.argument, access.width))
    shared, wgmma = kernel.metadata.shared, count(ptx, "wgmma.mma_async")
    return {
        "registers": registers,
        "spill_bytes": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "shared_bytes": shared,
        "shared_limit_bytes": LIMITS[arch].shared_per_block,
        # of all groups, where they are specialised
        "num_warps": kernel.metadata.num_warps,
        "occupancy": occupancy(arch, registers=registers, shared_bytes=shared, warps=kernel.metadata.num_warps),
        # Gluon begins with wgmma's own
        "dots": len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot)\b", kernel.asm.get("ttir", kernel.asm["ttgir"]))),
        "wgmma": wgmma,
        "mma": count(ptx, "mma.sync"),
        "tcgen05": count(ptx, "tcgen05.mma"),
        "narrowest_global_load_bytes": _narrowest(loads or scalars, kinds, case.dtype),
        "narrowest_global_store_bytes": _narrowest(stores, kinds, case.dtype),
        "global_loads": loads,
        "global_stores": stores,
        # C7515: "potential performance loss: wgmma.mma_async instructions are serialized"
        "wgmma_serialized": "C7515" in log,
    } | (wgmma_loop(disassemble(kernel.asm["cubin"])) if wgmma else {})
