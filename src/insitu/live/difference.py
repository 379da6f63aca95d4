"""The exact difference between two versions of one tensor, small because most weights do not move at all in a short lesson.

A block is the bit patterns of up to :data:`BLOCK` elements, seen as integers. Stored are which of them changed and by how much:
``zigzag(after - before) - 1``, modulo 2**bits. Small numbers change oftener than large ones (the spacing of floats grows with
the exponent, an optimizer's step does not), so elements are taken in the order of their magnitude, two binades a class. A
reader knows the classes of the side it has; which elements changed class is stored too, so that a difference can be undone
as well as done.
"""

import itertools
import struct
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

BLOCK = 1 << 18  # elements; what is worked on at a time fits a core's cache
# Numbers like these have no repetitions to look for; what counts is the entropy coder.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6)

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
    was, now = _classes(before, form), _classes(after, form)
    order = _order(now)  # the side that is known where this is needed
    moved = (was != now)[order]
    zigzag = _zigzag(after - before, form)[_order(was)]
    changed = zigzag != 0
    values = zigzag[changed] - form.unsigned(1)
    # A plane for each byte of the values, as the upper ones are nearly always 0; a frame for each part, as each has a
    # distribution of its own.
    planes = values.view(np.uint8).reshape(-1, values.itemsize).T
    parts = [np.packbits(moved), (was - now)[order][moved], np.packbits(changed), *planes]
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD)
    frames = [compressor.compress(part.tobytes()) for part in parts]
    return struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)


def apply(block: Bits, data: bytes | memoryview, dtype: torch.dtype, *, backwards: bool = False) -> Bits:
    """The other side of the block: ``after`` for ``before``, or the reverse. Raises DifferenceError if it cannot be."""
    form = _FORMATS[dtype]
    parts = _unpack(data, 3 + block.itemsize, block.size)
    moved, changed = (_mask(part, block.size) for part in (parts[0], parts[2]))
    steps, planes = parts[1], parts[3:]
    counts = [moved.sum(), *[changed.sum()] * block.itemsize]
    if [part.size for part in (steps, *planes)] != counts:
        raise DifferenceError(f"a stored difference holds other numbers of values than it says ({counts})")
    classes = _classes(block, form)
    if backwards:
        classes[_order(classes)[moved]] += steps
    zigzag = np.empty_like(block)
    values = np.stack(planes, axis=1).view(form.unsigned).ravel()
    ordered = np.zeros_like(block)
    ordered[changed] = values + form.unsigned(1)
    zigzag[_order(classes)] = ordered
    step = _unzigzag(zigzag, form)
    other: Bits = block - step if backwards else block + step
    return other


def _classes(block: Bits, form: _Format) -> NDArray[np.uint8]:
    classes: Bits = (block >> form.unsigned(form.shift + 1)) & form.unsigned(form.exponents >> 1)
    return classes.astype(np.uint8)


def _order(classes: NDArray[np.uint8]) -> NDArray[np.intp]:
    order: NDArray[np.intp] = np.argsort(classes, kind="stable")  # a radix sort for bytes
    return order


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


def _unpack(data: bytes | memoryview, parts: int, most: int) -> list[NDArray[np.uint8]]:
    """The parts of a stored difference, each of at most so many bytes."""
    try:
        sizes = struct.unpack_from(f"<{parts}I", data)
        ends = list(itertools.accumulate(sizes, initial=4 * parts))
        if ends[-1] != len(data):
            raise DifferenceError(f"a stored difference has {len(data)} bytes, its parts need {ends[-1]}")
        return [_decompress(data[start:end], most) for start, end in itertools.pairwise(ends)]
    except (zstandard.ZstdError, struct.error) as error:
        raise DifferenceError(f"a stored difference cannot be unpacked: {error}") from error


def _decompress(frame: bytes | memoryview, most: int) -> NDArray[np.uint8]:
    # A frame says its size, and so much is allocated, whatever max_output_size is: look before.
    if not 0 <= (size := zstandard.frame_content_size(frame)) <= most:
        raise DifferenceError(f"a part of a stored difference would have {size} bytes; expected at most {most}")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False), np.uint8)


def _mask(data: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    if data.size != -(-count // 8):
        raise DifferenceError(f"a stored difference is of another number of elements than {count}")
    return np.unpackbits(data, count=count).view(np.bool_)
