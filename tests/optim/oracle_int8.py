"""Int8 storage in float64 NumPy, group by group, written from the words of ``insitu.optim.int8`` and not from its code."""

from math import ceil, frexp, ldexp

import numpy as np
from numpy.typing import NDArray

from insitu.optim.seeds import mix

SMALLEST = 2.0**-126


def bf16_at_least(x: float) -> float:
    """The smallest number of 8 bits that is not below ``x`` > 0."""
    mantissa, exponent = frexp(x)
    return ldexp(ceil(mantissa * 256), exponent - 8)


def scale_of(values: NDArray[np.float32], known: float) -> float:
    largest = float(np.abs(values).max())
    if 96 * known <= largest <= 127 * known:
        return known
    return bf16_at_least(max(float(np.float32(largest) / np.float32(120)), SMALLEST))


def random_16_bits(key: int, index: int) -> int:
    """Those of an element: half of a word that is hashed from its pair's number, with a key of its own for each 2^32 pairs."""
    pair, odd = divmod(index, 2)
    low, factor = divmod(mix(key, pair >> 32), 2**31)
    word = (pair * 0x9E3779B1 + low) % 2**32
    for multiplier in (2 * factor + 1, 0x85EBCA6B):
        signed = word - 2**32 if word >= 2**31 else word
        word = (word ^ (signed >> 15) % 2**32) * multiplier % 2**32
    return word >> 16 if odd else word & 0xFFFF


def write(
    W: NDArray[np.float32], scale: NDArray[np.float64], size: int, key: int | None
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """What is stored of ``W`` (rows, cols) where the scales were ``scale`` (rows, groups)."""
    q, scale = np.zeros(W.shape, np.int8), scale.copy()
    for i, row in enumerate(W):
        for g, first in enumerate(range(0, W.shape[1], size)):
            group = row[first : first + size]
            s = scale[i, g] = scale_of(group, scale[i, g])
            for j, w in enumerate(group, first):
                steps = float(np.float32(w) / np.float32(s))
                if key is None:
                    q[i, j] = round(steps)  # half to even
                else:
                    u = (random_16_bits(key, i * W.shape[1] + j) + 0.5) / 2**16
                    q[i, j] = np.floor(np.float32(np.float32(steps) + np.float32(u)))
    return q, scale


def read(q: NDArray[np.int8], scale: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    return q * np.repeat(scale, size, 1)[:, : q.shape[1]]
