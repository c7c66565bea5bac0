"""How the fused normalisation deals an array to programs.

A program reads rows: the channels of some groups at one position, which lie side by side. Memory
moves 32 bytes at least, and 128 at best. What a program holds in registers it reads once; so it
takes all positions, and as many groups as then fit. Where not even 16 bytes of each position fit,
it takes 128 bytes and walks over the positions twice.
"""

from __future__ import annotations

from typing import NamedTuple

HELD = 16384
"""Elements of an array that a program aims to hold in registers: 64 for each of 256 threads, so
that two programs share a processor; of each of two arrays 32 for each of 512."""
TILE = 4096
"""Elements that a program reads at once where it walks."""
SECTOR, LINE = 32, 128
"""Bytes of a position that a program reads at least, and at most: what memory moves at once."""


def padded(count: int) -> int:
    """The least power of two that is not below count."""
    return 1 << (count - 1).bit_length()


class Plan(NamedTuple):
    """How an array is dealt to programs."""

    groups: int
    """Groups of channels of one program."""
    tile: int
    """Positions that are read at once, a power of two; all of them: nothing is read twice."""
    warps: int


MEASURED: dict[tuple[int, int, int, int, int], Plan] = {}
"""Plans that were found by trial, before all rules: `benchmarks/normalisation.py --tune`."""


def plan(channels: int, groups: int, positions: int, itemsize: int, arrays: int = 1) -> Plan:
    """The plan for a shape: rows of 32 to 128 bytes, all positions at once if they fit.

    Arguments:
        arrays: as many as a program must hold: one forward, two (x and dy) for the gradient.
    """
    measured = MEASURED.get((channels, groups, positions, itemsize, arrays))
    if measured is not None:
        return measured
    width = channels // groups
    lanes, rows = padded(width), padded(positions)
    held = 1
    while groups % (2 * held) == 0 and 2 * held * width * itemsize <= LINE:
        thin = held * width * itemsize < SECTOR
        if rows * 2 * held * lanes > (2 * HELD // arrays if thin else HELD):
            break
        held *= 2
    fits = rows * held * lanes <= 2 * HELD // arrays
    if fits and (2 * held * width * itemsize >= SECTOR or held == groups):
        return Plan(held, rows, max(1, min(16, rows * held * lanes * arrays // 2048)))
    held = 1
    while groups % (2 * held) == 0 and 2 * held * width * itemsize <= LINE:
        held *= 2
    return Plan(held, max(1, min(TILE // (held * lanes), rows)), 4)
