"""Global memory accesses in a kernel's PTX: the width of each, and the argument that it goes through.

A register carries two kinds of fact, followed through the arithmetic to a fixed point: the pointer arguments that
its value was computed from, and whether it differs between the threads of a block. So each access is known by its
argument, and an access whose address is the same in all threads is told apart as a scalar (one timestep of a batch,
say): it is one value a block, and no width would make it cheaper.
"""

import re
from dataclasses import dataclass

TMA = "tma"
UNKNOWN = "?"

_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*?);")
_REGISTER = re.compile(r"%[a-z]+\d+")
_BRACKET = re.compile(r"\[\s*([^\]]*)\]")
_PARAM = re.compile(r"_param_(\d+)\s*[\]+]")
_VECTOR_BITS = re.compile(r"(?:\.v(\d))?\.[busf](\d+)$")
# special registers whose value depends on the thread
_THREAD = re.compile(r"%(?:tid|laneid|warpid)\b")
# instructions that write no register; the first operand of every other one is its destination
_NO_RESULT = ("st.", "red.", "cp.", "bar", "bra", "ret", "wgmma.fence", "wgmma.commit", "fence", "prefetch", "mbarrier")


@dataclass(frozen=True)
class Access:
    """One global memory instruction."""

    argument: str
    """Name of the pointer argument it goes through, ``tma``, or ``?`` where the address has no known origin."""
    width: int
    """Bytes a thread moves; 16 for TMA, which has no narrower transaction."""
    is_store: bool
    is_scalar: bool
    """All threads use the same address."""


def _instructions(ptx: str) -> list[tuple[str, str]]:
    found = []
    for line in ptx.splitlines():
        if match := _INSTRUCTION.match(line):
            found.append((match[1], match[2]))
    return found


def _split_result(operands: str) -> tuple[list[str], str]:
    """The registers an instruction writes, and the text of the operands it reads."""
    head, sep, tail = operands.partition("}") if operands.lstrip().startswith("{") else operands.partition(",")
    return _REGISTER.findall(head), tail if sep else ""


def _flow(instructions: list[tuple[str, str]]) -> dict[str, int]:
    """Facts of each register as bits: bit 0 says that threads differ, bit 1 + i that parameter i went into it."""
    facts: dict[str, int] = {}
    edges: list[tuple[list[str], list[str], int]] = []
    for op, operands in instructions:
        if op.startswith(_NO_RESULT):
            continue
        written, read = _split_result(operands)
        sources, constant, keep = _REGISTER.findall(read), 0, -1
        if op.startswith("ld.param"):
            param = _PARAM.search(read)
            sources, constant = [], 2 << int(param[1]) if param else 0
        elif op.startswith(("ld.global", "setp")):
            # what is loaded is data: it differs between threads where its address does, and points nowhere
            keep = 1
        elif op.startswith(("ld.", "atom.", "shfl", "ldmatrix")):
            # handed over by another thread
            constant = 1
        if _THREAD.search(read):
            constant |= 1
        edges.append((written, [(s, keep) for s in sources], constant))
    changed = True
    while changed:
        changed = False
        for written, sources, value in edges:
            for source, keep in sources:
                value |= facts.get(source, 0) & keep
            for register in written:
                if facts.get(register, 0) | value != facts.get(register, 0):
                    facts[register] = facts.get(register, 0) | value
                    changed = True
    return facts


def _width_and_address(op: str, operands: str) -> tuple[int, str] | None:
    """Bytes and address operand of a global access; None for every other instruction."""
    brackets = _BRACKET.findall(operands)
    if op.startswith("cp.async.bulk"):
        if "commit_group" in op or "wait_group" in op:
            return None
        return 16, TMA
    if op.startswith("cp.async") and ".global" in op:
        # cp.async [shared], [global], bytes
        return int(operands.split("]")[2].split(",")[1], 0), brackets[1]
    if op.startswith(("ld.global", "st.global")):
        lanes, bits = _VECTOR_BITS.search(op).groups()
        return int(lanes or 1) * int(bits) // 8, brackets[0]
    return None


def global_accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """Every global load and store of a kernel.

    ``arguments`` names the kernel's run-time parameters in order, an empty name for one that is no pointer.
    """
    instructions = _instructions(ptx)
    facts = _flow(instructions)
    accesses = []
    for op, operands in instructions:
        found = _width_and_address(op, operands)
        if found is None:
            continue
        width, address = found
        is_store = op.startswith("st.") or ".global.shared" in op
        if address == TMA:
            accesses.append(Access(TMA, width, is_store, False))
            continue
        fact = 0
        for register in _REGISTER.findall(address):
            fact |= facts.get(register, 0)
        names = [name for i, name in enumerate(arguments) if name and fact & 2 << i]
        accesses += [Access(name, width, is_store, not fact & 1) for name in names or [UNKNOWN]]
    return accesses


def count(ptx: str, op: str) -> int:
    """Number of instructions ``op`` in the PTX."""
    return sum(name.startswith(op) for name, _ in _instructions(ptx))
