"""How many warps of a kernel an SM can hold at once: CUDA's occupancy calculation."""

from dataclasses import dataclass

__all__ = ["SM", "SMS", "occupancy", "resident_blocks"]


@dataclass(frozen=True)
class SM:
    """Limits of one multiprocessor (CUDA programming guide, table of compute capabilities)."""

    shared: int  # bytes, of which a block takes 1 KB for the system
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    partitions: int = 4  # each with a quarter of the registers


# A100, H100, B200
SMS = {80: SM(164 * 1024), 90: SM(228 * 1024), 100: SM(228 * 1024)}
RESERVED_SHARED = 1024  # bytes a block
SHARED_UNIT = 128  # bytes
REGISTER_UNIT = 256  # registers of a warp


def resident_blocks(sm: SM, warps: int, registers: int, shared: int) -> int:
    """Blocks that fit on one SM; 0 where not even one does.

    Args:
        sm: the limits.
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic, without those of the system.
    """
    shared = _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    blocks = min(sm.blocks, sm.warps // warps, sm.shared // shared)
    if registers:
        per_warp = _round_up(32 * registers, REGISTER_UNIT)
        # the check at launch takes a block's warps to be spread over all partitions
        if per_warp * _round_up(warps, sm.partitions) > sm.registers:
            return 0
        in_partition = sm.registers // sm.partitions // per_warp
        blocks = min(blocks, in_partition * sm.partitions // warps)
    return blocks


def occupancy(sm: SM, warps: int, registers: int, shared: int) -> float:
    """Share of the SM's warp slots in use when it is full of this kernel's blocks."""
    return resident_blocks(sm, warps, registers, shared) * warps / sm.warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
