"""Randomness as a pure function: every random choice of an optimizer follows from a few integers.

No generator state is kept anywhere, so a resumed, resharded or replayed run repeats the same choices, and replicas
agree without talking to each other.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(*values: int) -> int:
    """Hash integers to one integer in [0, 2^63), which fits an int64.

    Each value passes through the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators"), so neighbouring seeds, positions or steps give unrelated results. The order matters.

    >>> mix(0, 1) != mix(1, 0)
    True
    """
    state = 0
    for value in values:
        state = (state + (value & _MASK) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
