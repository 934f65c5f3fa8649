"""Occupancy: the blocks of a kernel that one multiprocessor holds, by the rules of NVIDIA's cuda_occupancy.h."""

from dataclasses import dataclass

KB = 1024
# cuda_occupancy.h (CUDA 13.0): a warp's registers are allocated by 256, a block's shared memory by 128 bytes
REGISTER_UNIT = 256
SHARED_UNIT = 128
# CUDA C++ programming guide: the system keeps 1 KB of shared memory for each block from compute capability 8.0 on
SHARED_RESERVED = 1 * KB
REGISTERS_PER_SM = 64 * KB
SCHEDULERS = 4


@dataclass(frozen=True)
class Limits:
    """The limits of one streaming multiprocessor."""

    warps: int
    """Resident warps."""
    blocks: int
    """Resident blocks."""
    shared_per_sm: int
    """Bytes of shared memory."""
    shared_per_block: int
    """Bytes of shared memory that one block may ask for."""


# CUDA C++ programming guide, "Technical specifications per compute capability"; blocks from cuda_occupancy.h
LIMITS = {
    80: Limits(warps=64, blocks=32, shared_per_sm=164 * KB, shared_per_block=163 * KB),
    86: Limits(warps=48, blocks=16, shared_per_sm=100 * KB, shared_per_block=99 * KB),
    89: Limits(warps=48, blocks=24, shared_per_sm=100 * KB, shared_per_block=99 * KB),
    90: Limits(warps=64, blocks=32, shared_per_sm=228 * KB, shared_per_block=227 * KB),
    100: Limits(warps=64, blocks=32, shared_per_sm=228 * KB, shared_per_block=227 * KB),
    120: Limits(warps=48, blocks=24, shared_per_sm=100 * KB, shared_per_block=99 * KB),
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident_blocks(arch: int, *, registers: int, shared_bytes: int, warps: int) -> int:
    """Blocks of ``warps`` warps resident on one multiprocessor; 0 where a single one does not fit."""
    limits = LIMITS[arch]
    if shared_bytes > limits.shared_per_block:
        return 0
    # registers live in the four schedulers' own files, so a warp never straddles two of them
    warps_per_scheduler = REGISTERS_PER_SM // SCHEDULERS // _round_up(32 * registers, REGISTER_UNIT)
    by_registers = warps_per_scheduler * SCHEDULERS // warps
    by_shared = limits.shared_per_sm // _round_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
    return min(limits.warps // warps, limits.blocks, by_registers, by_shared)


def occupancy(arch: int, *, registers: int, shared_bytes: int, warps: int) -> float:
    """Resident warps as a share of the most the multiprocessor holds."""
    blocks = resident_blocks(arch, registers=registers, shared_bytes=shared_bytes, warps=warps)
    return blocks * warps / LIMITS[arch].warps
