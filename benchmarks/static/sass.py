"""What a kernel's SASS says of its innermost work: the loop that multiplies matrices on sm_90, by the nvdisasm that
Triton brings.
"""

import re
import subprocess
import tempfile

_LABEL = re.compile(r"^\s*(\.L[\w.]+):")
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L[\w.]+)\)")
_GROUPS = re.compile(r"SB0, (0x[0-9a-f]+)")


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _loops(sass: str) -> list[list[tuple[str, str]]]:
    """(opcode, operands) of every stretch of code with wgmma that a branch closes to a loop, if it holds no other."""
    instructions, labels, found = [], {}, []
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append((match[1], match[2]))
            target = _TARGET.search(match[2])
            start = labels.get(target[1]) if target and match[1].startswith("BRA") else None
            # a branch to itself is the end of a kernel
            if start is None or start >= len(instructions) - 1:
                continue
            loop = instructions[start:]
            # the inner ones end first
            inner = any(start <= first for first, _ in found)
            if not inner and any(op.startswith("HGMMA") for op, _ in loop):
                found.append((start, loop))
    return [loop for _, loop in found]


def wgmma_loop(sass: str) -> dict[str, int]:
    """Counts of the innermost loop with the most wgmma; empty if there is none.

    ``loop_conversions`` counts conversions of single values, at a quarter of the rate of packed ones;
    ``loop_loads`` counts loads and copies from global memory, ``loop_copies_in_flight`` the groups of cp.async that the
    loop's wait leaves in flight.
    """
    loops = _loops(sass)
    if not loops:
        return {}
    # a wait that is moved behind the loop branches back into its middle: a longer way with as many
    loop = max(loops, key=lambda loop: (sum(op.startswith("HGMMA") for op, _ in loop), -len(loop)))
    groups = [_GROUPS.search(operands) for op, operands in loop if op.startswith("DEPBAR")]
    return {
        "loop_instructions": len(loop),
        "loop_wgmma": sum(op.startswith("HGMMA") for op, _ in loop),
        "loop_wgmma_waits": sum(op.startswith("WARPGROUP.DEPBAR") for op, _ in loop),
        "loop_conversions": sum(op.partition(".")[0] == "F2F" for op, _ in loop),
        "loop_barriers": sum(op.startswith("BAR") for op, _ in loop),
        "loop_loads": sum(op.startswith("LDG") for op, _ in loop),
        "loop_copies_in_flight": min((int(x[1], 16) for x in groups if x), default=0),
    }
