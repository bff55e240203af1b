"""Counter-based randomness: the draw at (seed, choice, index) depends on nothing else."""

from __future__ import annotations

from typing import Final

MASK_64: Final = (1 << 64) - 1
GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, for token `index` of choice `choice` under `seed`."""
    state = _mix(seed & MASK_64)
    state = _mix(state + (choice + 1) * GOLDEN_GAMMA)
    state = _mix(state + (index + 1) * GOLDEN_GAMMA)
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """The finalizer of splitmix64."""
    value &= MASK_64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK_64
    return value ^ (value >> 31)
