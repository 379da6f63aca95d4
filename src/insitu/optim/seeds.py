"""Randomness as a pure function: every random choice of an optimizer follows from a few integers.

No generator state is kept anywhere, so a resumed, resharded or replayed run repeats the same choices, and replicas
agree without talking to each other.
"""

from __future__ import annotations

from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


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
        state = ((state ^ (state >> 30)) * _FACTORS[0]) & _MASK
        state = ((state ^ (state >> 27)) * _FACTORS[1]) & _MASK
        state ^= state >> 31
    return state >> 1


def mix_on_device(first: Tensor, *others: Tensor | int) -> Tensor:
    """As :func:`mix`, element by element, of int64 tensors that broadcast: computed where they lie, and by torch.

    int64 products and sums wrap as those of uint64 do; only a shift to the right must be told where the sign is.
    """
    state = first.new_zeros(())
    for value in (first, *others):
        state = state + (value if isinstance(value, Tensor) else signed(value, 64)) + signed(_GOLDEN, 64)
        state = (state ^ _shifted(state, 30)) * signed(_FACTORS[0], 64)
        state = (state ^ _shifted(state, 27)) * signed(_FACTORS[1], 64)
        state = state ^ _shifted(state, 31)
    return _shifted(state, 1)


def _shifted(word: Tensor, by: int) -> Tensor:
    return (word >> by) & (_MASK >> by)


def signed(word: int, bits: int) -> int:
    """The signed integer of so many bits with the low bits of ``word``, as tensors hold it."""
    half = 1 << (bits - 1)
    return (word + half) % (2 * half) - half
