"""The exact difference between two versions of one tensor, small because most weights do not move at all in a short lesson.

A block is the bit patterns of up to :data:`BLOCK` elements, seen as integers. Stored are which of them changed and by how much:
``zigzag(after - before) - 1``, modulo 2**bits. Small numbers change oftener than large ones (the spacing of floats grows with
the exponent, an optimizer's step does not), so elements are taken class by class of their magnitude, two binades a class, and
each class is compressed by itself. A reader knows the classes of the side it has; the few elements that changed class are
stored too, so that a difference can be undone as well as done.
"""

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

BLOCK = 1 << 18  # elements; what is worked on at a time fits a core's cache
# Numbers like these have no repetitions to look for; what counts is the entropy coder.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6)

_CLASSES = 6  # the largest numbers of a block are in the last one, all that are far smaller in the first

Bits = NDArray[np.unsignedinteger]


class DifferenceError(ValueError):
    """A stored difference that is not what was written, or does not belong to the tensor it is applied to."""


@dataclass(frozen=True, slots=True)
class _Format:
    """How the bits of a float are laid out: an unsigned integer as wide, and where its exponent is."""

    unsigned: type[np.unsignedinteger]
    signed: type[np.signedinteger]
    shift: int
    exponents: int


_FORMATS = {
    torch.bfloat16: _Format(np.uint16, np.int16, 7, 0xFF),
    torch.float16: _Format(np.uint16, np.int16, 10, 0x1F),
    torch.float32: _Format(np.uint32, np.int32, 23, 0xFF),
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FORMATS}


def bits(tensor: torch.Tensor) -> Bits:
    """The bit patterns of a floating tensor, flat, on the host; shares its memory where it can."""
    form = _FORMATS[tensor.dtype]
    integers = {np.uint16: torch.int16, np.uint32: torch.int32}[form.unsigned]
    flat: Bits = tensor.detach().cpu().contiguous().view(-1).view(integers).numpy().view(form.unsigned)
    return flat


def encode(before: Bits, after: Bits, dtype: torch.dtype) -> bytes:
    """The difference of one block."""
    form = _FORMATS[dtype]
    floor = _floor(before, form)
    was, now = _classes(before, form, floor), _classes(after, form, floor)
    moved = was != now
    parts = [np.packbits(moved), (was - now)[moved]]  # steps are modulo 256
    zigzag = _zigzag(after - before, form)
    for members in _members(was):
        part = zigzag[members]
        changed = part != 0
        values = part.take(np.flatnonzero(changed)) - form.unsigned(1)  # a third of the time of part[changed]
        # A plane for each byte of the values: the upper ones are nearly always 0.
        parts += [np.packbits(changed), *values.view(np.uint8).reshape(-1, values.itemsize).T]
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    frames = [compressor.compress(part.tobytes()) if part.size else b"" for part in parts]
    return struct.pack(f"<B{len(frames)}I", floor, *map(len, frames)) + b"".join(frames)


def apply(block: Bits, data: bytes | memoryview, dtype: torch.dtype, *, backwards: bool = False) -> Bits:
    """The other side of the block: ``after`` for ``before``, or the reverse. Raises DifferenceError if it cannot be."""
    form = _FORMATS[dtype]
    floor, parts = _unpack(data, 2 + _CLASSES * (1 + block.itemsize), block.size)
    moved = _mask(next(parts), block.size)
    classes = _classes(block, form, floor)
    steps = _exactly(next(parts), int(moved.sum()))
    if backwards:
        classes[moved] += steps
        if classes.size and classes.max() >= _CLASSES:
            raise DifferenceError("a stored difference names a class of magnitude that there is not")
    zigzag = np.zeros_like(block)
    for members in _members(classes):
        changed = members[_mask(next(parts), members.size)]
        planes = [_exactly(next(parts), changed.size) for _ in range(block.itemsize)]
        zigzag[changed] = np.stack(planes, axis=1).view(form.unsigned).ravel() + form.unsigned(1)
    step = _unzigzag(zigzag, form)
    other: Bits = block - step if backwards else block + step
    return other


def _floor(block: Bits, form: _Format) -> int:
    """What the classes of this block are counted from, so that its largest number is in the last one."""
    return max(0, int(_magnitudes(block, form).max(initial=0)) - _CLASSES + 1)


def _magnitudes(block: Bits, form: _Format) -> NDArray[np.uint8]:
    found: Bits = (block >> form.unsigned(form.shift + 1)) & form.unsigned(form.exponents >> 1)
    return found.astype(np.uint8)


def _classes(block: Bits, form: _Format, floor: int) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = np.clip(_magnitudes(block, form), floor, floor + _CLASSES - 1) - np.uint8(floor)
    return found


def _members(classes: NDArray[np.uint8]) -> Iterator[NDArray[np.intp]]:
    """The elements of each class, in their order."""
    return (np.flatnonzero(classes == k) for k in range(_CLASSES))


def _zigzag(step: Bits, form: _Format) -> Bits:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    signed = step.view(form.signed)
    width = 8 * step.itemsize - 1
    folded: Bits = ((signed << form.signed(1)) ^ (signed >> form.signed(width))).view(form.unsigned)
    return folded


def _unzigzag(zigzag: Bits, form: _Format) -> Bits:
    one = form.unsigned(1)
    unfolded: Bits = (zigzag >> one) ^ (~(zigzag & one) + one)
    return unfolded


def _unpack(data: bytes | memoryview, parts: int, most: int) -> tuple[int, Iterator[NDArray[np.uint8]]]:
    """The floor and the parts of a stored difference, each of at most so many bytes."""
    try:
        floor, *sizes = struct.unpack_from(f"<B{parts}I", data)
        ends = list(itertools.accumulate(sizes, initial=1 + 4 * parts))
        if ends[-1] != len(data):
            raise DifferenceError(f"a stored difference has {len(data)} bytes, its parts need {ends[-1]}")
        found = [_decompress(data[start:end], most) for start, end in itertools.pairwise(ends)]
    except (zstandard.ZstdError, struct.error) as error:
        raise DifferenceError(f"a stored difference cannot be unpacked: {error}") from error
    if floor + _CLASSES > 256:
        raise DifferenceError(f"a stored difference counts its classes of magnitude from {floor}")
    return floor, iter(found)


def _decompress(frame: bytes | memoryview, most: int) -> NDArray[np.uint8]:
    if not frame:
        return np.empty(0, np.uint8)
    # A frame says its size, and so much is allocated, whatever max_output_size is: look before.
    if not 0 <= (size := zstandard.frame_content_size(frame)) <= most:
        raise DifferenceError(f"a part of a stored difference would have {size} bytes; expected at most {most}")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False), np.uint8)


def _exactly(data: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    if data.size != count:
        raise DifferenceError(f"a stored difference has {data.size} values where {count} should be")
    return data


def _mask(data: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    return np.unpackbits(_exactly(data, -(-count // 8)), count=count).view(np.bool_)
