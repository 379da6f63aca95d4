"""Stochastic rounding of float32 to bfloat16, or to the integers of int8 storage, without a random generator.

A bf16 weight moves only when an update exceeds half its last place; a relative update of 1e-4 leaves 98 % of the
weights unchanged under nearest rounding. Rounding up with probability equal to the discarded fraction keeps the mean.

The 16 random bits of an element are a hash of (key, global element index), so the slices of a tensor round exactly as
the whole does, and replicas stay bit-identical. The hash is made of wrapping int32 products, xors and shifts, which
torch runs vectorised on every device; one 32-bit word serves two neighbouring elements.

The other way to keep small updates is ``compensated``: the parameter is the bf16 number nearest to the float32 result,
and a second bf16 tensor keeps what is missing. Together they hold 16 bits of mantissa, and nothing is random.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from insitu.optim.int8 import LARGEST, Groups
from insitu.optim.seeds import mix, mix_on_device, signed


def _scalar(word: int) -> Tensor:
    """A 0-dim int32: torch would convert a Python number anew at each operation."""
    return torch.tensor(signed(word, 32), dtype=torch.int32)


Index = int | Tensor
Key = int | Tensor  # a hash of (seed, step); 0-dim int64 where the step is counted on the device
WEYL, MIXER = 0x9E3779B1, 0x85EBCA6B
_PIECE = 1 << 16  # elements rounded at a time by a thread, so that the scratch stays in the cache of its core
_PERIOD = 1 << 33  # elements after which the 32-bit counter of words starts again
_MIXER, _SHIFT, _UPPER = map(_scalar, (MIXER, 15, 0xFFFF0000))


class Scratch(NamedTuple):
    """Memory to be reused from piece to piece: fresh pages would cost more than the arithmetic."""

    counters: Tensor  # (n / 2 + 1,) int32: a Weyl sequence, the odd constant times 0, 1, 2, ...
    words: Tensor  # (n / 2 + 1,) int32
    bits: Tensor  # (n,) int32


def make_scratch(device: torch.device, elements: int, bits: Tensor | None = None) -> Scratch:
    """Scratch to round pieces of up to ``elements`` (at least 2); ``bits`` may be memory that is free at that time."""
    counters = torch.arange(elements // 2 + 1, dtype=torch.int32, device=device) * _scalar(WEYL)
    if bits is None:
        bits = torch.empty(elements, dtype=torch.int32, device=device)
    return Scratch(counters, torch.empty_like(counters), bits)


@overload
def hash_numbers(key: int, start: int) -> tuple[int, int, int]: ...
@overload
def hash_numbers(key: Tensor, start: int) -> tuple[Tensor, Tensor, int]: ...
def hash_numbers(key: Key, start: int) -> tuple[Index, Index, int]:
    """(base, factor, odd), int32, of the words of the elements from ``start`` on, up to the next multiple of 2^33.

    Element i takes a half, low or high as i + odd is even or odd, of the word that follows from the int32
    w = base + WEYL * ((i + odd) >> 1) by w ^= w >> 15, w *= factor, w ^= w >> 15, w *= MIXER. Of keys on a device, (...) int64,
    base and factor are there too.
    """
    first, odd = divmod(start, 2)
    if isinstance(key, Tensor):
        mixed = mix_on_device(key, first >> 32)
        words = (mixed >> 31) + signed(first * WEYL, 32), 2 * (mixed & 0x7FFFFFFF) + 1
        return words[0].to(torch.int32), words[1].to(torch.int32), odd  # which wraps
    # What lies above the counter's 32 bits enters through the key.
    low, factor = divmod(mix(key, first >> 32), 1 << 31)
    return signed(first * WEYL + low, 32), signed(2 * factor + 1, 32), odd


def hashed_bits(base: Tensor, factor: Tensor, odd: Tensor, index: Tensor) -> Tensor:
    """As ``_random_bits``, in one expression for a compiler; ``index`` (int32) counts from 0, the numbers are 0-dim int32."""
    place = index + odd
    word = base + (place >> 1) * signed(WEYL, 32)
    word = (word ^ (word >> 15)) * factor
    word = (word ^ (word >> 15)) * signed(MIXER, 32)
    return (word >> ((place & 1) << 4)) & 0xFFFF


def in_one_period(start: int, count: int) -> bool:
    """Whether ``hash_numbers`` of the first holds for all of ``count`` elements."""
    return start // _PERIOD == (start + count - 1) // _PERIOD


def _random_bits(key: Key, start: int, count: int, scratch: Scratch) -> Tensor:
    """(count,) int32, 16 random bits each, for the elements from global index ``start`` on."""
    base, factor, odd = hash_numbers(key, start)
    num = (odd + count + 1) // 2
    words, shifted = scratch.words[:num], scratch.bits[:num]
    torch.add(scratch.counters[:num], base, out=words)
    words.bitwise_xor_(torch.bitwise_right_shift(words, _SHIFT, out=shifted)).mul_(factor)
    words.bitwise_xor_(torch.bitwise_right_shift(words, _SHIFT, out=shifted)).mul_(_MIXER)
    return scratch.bits[:count].copy_(words.view(torch.uint16)[odd : odd + count])


def _random_bits_at(key: int, index: Tensor) -> Tensor:
    """As ``_random_bits``, for elements anywhere: ``index`` (n,) int64 holds their global indices."""
    first = index // 2
    out = torch.empty(len(index), dtype=torch.int32, device=index.device)
    for period in torch.unique(first >> 32).tolist():  # one, but for tensors beyond 2^33 elements
        low, factor = divmod(mix(key, period), 1 << 31)
        words = (first * WEYL + low).to(torch.int32)
        words.bitwise_xor_(words >> _SHIFT).mul_(signed(2 * factor + 1, 32))
        words.bitwise_xor_(words >> _SHIFT).mul_(_MIXER)
        here = first >> 32 == period
        out[here] = torch.where(index % 2 == 0, words & 0xFFFF, (words >> 16) & 0xFFFF)[here]
    return out


def round_into(out: Tensor, source: Tensor, key: Key, start: Index = 0, scratch: Scratch | None = None) -> None:
    """Write ``source`` to ``out`` in bfloat16, rounded stochastically; the content of ``source`` is lost.

    Args:
        out: contiguous bfloat16.
        source: contiguous float32 of the same number of elements.
        key: a hash of (seed, step).
        start: global (row-major) index of the first element, or of each element, (n,) int64, where they do not follow
            one another in the whole tensor.
        scratch: memory to reuse; ``source`` is rounded in pieces of its size.
    """
    target, bits = out.view(-1), source.view(-1).view(torch.int32)
    if isinstance(start, Tensor):
        assert isinstance(key, int)
        bits.add_(_random_bits_at(key, start)).bitwise_and_(_UPPER)
        target.copy_(source.view(-1))
        return
    scratch = scratch or make_scratch(source.device, max(2, min(_PIECE * torch.get_num_threads(), source.numel())))
    done = 0
    while done < bits.numel():
        # No piece crosses a multiple of 2^33, where the key changes.
        count = min(scratch.bits.numel(), bits.numel() - done, _PERIOD - (start + done) % _PERIOD)
        piece = bits[done : done + count]
        # 16 random bits carry into the upper half with probability (lower half) / 2^16; then the lower half goes.
        piece.add_(_random_bits(key, start + done, count, scratch)).bitwise_and_(_UPPER)
        target[done : done + count].copy_(piece.view(torch.float32))
        done += count


def round_to_integers(values: Tensor, key: Key, start: Index = 0, scratch: Scratch | None = None) -> None:
    """Round ``values`` (contiguous float32, magnitudes up to 127) down or up to integers, in place; the mean is kept to 2^-17.

    Args as of :func:`round_into`; an element's random bits are the same as there.
    """
    flat = values.view(-1)
    if isinstance(start, Tensor):
        assert isinstance(key, int)
        flat.add_(_uniform(_random_bits_at(key, start))).floor_()
        return
    scratch = scratch or make_scratch(values.device, max(2, min(_PIECE * torch.get_num_threads(), values.numel())))
    done = 0
    while done < flat.numel():
        count = min(scratch.bits.numel(), flat.numel() - done, _PERIOD - (start + done) % _PERIOD)
        flat[done : done + count].add_(_uniform(_random_bits(key, start + done, count, scratch))).floor_()
        done += count


def _uniform(bits: Tensor) -> Tensor:
    """(k + 1/2) / 2^16 for 16 bits k in each int32, in their memory: as the mantissa of a float32 from 1 to 2, less 1.

    Never 0 and never 1: an integer stays what it is.
    """
    bits.bitwise_left_shift_(7).bitwise_or_(0x3F800040)
    return bits.view(torch.float32).sub_(1)


class Precision(NamedTuple):
    """How one tensor is stored between steps; the arithmetic is float32 whatever it says.

    ``key`` asks for stochastic rounding, ``residual`` (the shape of the tensor, bf16) for compensated storage; neither is
    rounding to nearest. ``start`` is the global index of the tensor's first element, or of each. With ``groups`` what is
    stored is int8.
    """

    key: Key | None = None
    start: Index = 0
    residual: Tensor | None = None
    groups: Groups | None = None

    @property
    def width(self) -> int:
        """Elements that must be read and written together: a row of an int8 matrix, else 1."""
        return 1 if self.groups is None else self.groups.cols

    def of(self, first: int, count: int) -> Precision:
        """For ``count`` elements from the local, flat index ``first`` on."""
        return Precision(
            self.key,
            self.start[first : first + count] if isinstance(self.start, Tensor) else self.start + first,
            None if self.residual is None else self.residual.view(-1)[first : first + count],
            None if self.groups is None else self.groups.of(first, count),
        )

    def read(self, work: Tensor) -> Tensor:
        """Give ``work``, a float32 copy of the stored numbers, the values that they stand for."""
        if self.groups is not None:
            return self.groups.dequantize(work)
        return work if self.residual is None else work.view(-1).add_(self.residual.view(-1)).view(work.shape)

    def write(self, out: Tensor, work: Tensor, scratch: Scratch | None = None) -> None:
        """Store ``work`` in ``out``; the content of ``work`` is lost."""
        if self.groups is not None:
            steps = self.groups.requantize(work)
            if self.key is None:
                steps.round_()
            else:
                round_to_integers(steps, self.key, self.start, scratch)
            out.copy_(steps.view(out.shape).clamp_(-LARGEST, LARGEST))
        elif self.residual is not None:
            out.copy_(work)
            self.residual.view(-1).copy_(work.view(-1).sub_(out.view(-1)))
        elif self.key is not None:
            round_into(out, work, self.key, self.start, scratch)
        else:
            out.copy_(work)


def stochastic_round(source: Tensor, seed: int, step: int, start: Index = 0) -> Tensor:
    """``source`` (float32, any shape) in bfloat16: each element one of its two neighbours, the mean kept.

    A pure function of (seed, step, global element index): with ``start``, the index of the first element or of each, a
    slice rounds as the whole does.
    """
    out = torch.empty(source.shape, dtype=torch.bfloat16, device=source.device)
    round_into(out, source.detach().clone(memory_format=torch.contiguous_format), mix(seed, step), start)
    return out
