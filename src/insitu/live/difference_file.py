"""The file of a version: the exact difference of every tensor to the version it came from.

    | magic | blocks ... | index (JSON) | offset of the index | sha256 of all before | magic |

It is written front to back, so nothing need be known in advance, and it is whole or it is not opened: the checksum at the end
covers every byte before it, and what follows it is compared. The index gives each tensor's dtype and shape, the sha256 of its
bytes on both sides, and the offsets of its blocks, one for each slice of :data:`insitu.live.difference.BLOCK` elements.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from insitu.live.difference import BLOCK, DTYPES, Bits, DifferenceError, apply, bits, encode

MAGIC = b"INSITUD\x01"
_FORMAT = 1
_OFFSET = struct.Struct("<Q")
_TRAILER = struct.Struct("<Q32s8s")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file. ``offsets`` are of its blocks, and the end of the last one."""

    name: str
    dtype: str
    shape: list[int]
    before: str
    after: str
    offsets: list[int]


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: bytes, sha256 of all of it, and |after - before| / |before| over all tensors. ``before`` is the sha256
    of the tensors it starts from, in the order in which they came."""

    bytes: int
    sha256: str
    norm_ratio: float
    before: str


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


def write(
    file: BinaryIO, before: Iterable[tuple[str, torch.Tensor]], after: Mapping[str, torch.Tensor], threads: int
) -> Written:
    """Write the difference of ``after`` to ``before``, which may come in any order but must have the same names.

    Raises:
        DifferenceError: a tensor is missing on one side, or of another shape or dtype.
        OSError: the file cannot be written.
    """
    out = _Hashed(file)
    out.write(MAGIC)
    entries = []
    whole = hashlib.sha256()
    moved = norm = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for name, old in before:
            new = after.get(name)
            if new is None or (new.shape, new.dtype) != (old.shape, old.dtype):
                raise DifferenceError(f"{name!r} is not the same kind of tensor on both sides")
            was, now = bits(old), bits(new)
            sums = pool.map(_sha256, (was, now))
            hashed = pool.submit(whole.update, was.data)
            offsets = [out.size]
            for data, squares in pool.map(_block, *zip(*_slices(was, now, new.dtype), strict=True)):
                out.write(data)
                offsets.append(out.size)
                moved, norm = moved + squares[0], norm + squares[1]
            dtype = str(new.dtype).removeprefix("torch.")
            sum_before, sum_after = sums
            hashed.result()  # before the next tensor is added
            entries.append(Entry(name, dtype, list(new.shape), sum_before, sum_after, offsets))
    if left := after.keys() - {entry.name for entry in entries}:
        raise DifferenceError(f"{min(left)!r} is not in the version before")
    index = out.size
    out.write(json.dumps({"format": _FORMAT, "tensors": [asdict(entry) for entry in entries]}).encode())
    out.write(_OFFSET.pack(index))
    out.write(out.digest.digest() + MAGIC)
    ratio = math.sqrt(moved / norm) if norm else math.inf
    return Written(out.size, out.digest.hexdigest(), ratio, whole.hexdigest())


def _sha256(block: Bits) -> str:
    return hashlib.sha256(block.data).hexdigest()


def _slices(was: Bits, now: Bits, dtype: torch.dtype) -> Iterator[tuple[Bits, Bits, torch.dtype]]:
    for at in range(0, max(was.size, 1), BLOCK):
        yield was[at : at + BLOCK], now[at : at + BLOCK], dtype


def _block(was: Bits, now: Bits, dtype: torch.dtype) -> tuple[bytes, tuple[float, float]]:
    """The block, and the squares of the movement and of the weights before."""
    old, new = (_floats(side, dtype) for side in (was, now))
    with np.errstate(all="ignore"):  # weights that are not finite have no norm, and are still stored exactly
        squares = _square(np.subtract(new, old, out=new)), _square(old)
    return encode(was, now, dtype), squares


def _square(x: NDArray[np.float32]) -> float:
    return float(np.einsum("i,i->", x, x))  # one pass, no temporary, and no threads beside the pool's


def _floats(block: Bits, dtype: torch.dtype) -> NDArray[np.float32]:
    """A copy in float32."""
    if dtype == torch.bfloat16:
        return np.left_shift(block, 16, dtype=np.uint32).view(np.float32)
    return block.view(np.float16 if dtype == torch.float16 else np.float32).astype(np.float32)


class DifferenceFile:
    """An open file of a version, verified as a whole. Raises DifferenceError naming the file if it is not what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not mmap, which keeps a descriptor: a chain may be longer than a process may have files open.
            size = path.stat().st_size
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise DifferenceError(f"{path} cannot be read: {error}") from error
        self._data = mapped.numpy().data.cast("B")
        try:
            told = self._verified()
            if (found := told["format"]) == _FORMAT:
                self.entries = {entry["name"]: Entry(**entry) for entry in told["tensors"]}
                for entry in self.entries.values():
                    _check(entry, len(self._data))
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise DifferenceError(f"{path} is damaged: {error}") from error
        if found != _FORMAT:
            raise DifferenceError(
                f"{path} has format {found}, this insitu knows format {_FORMAT}; use the one that wrote it"
            )

    def _verified(self) -> Any:
        """The index, of a file that is whole."""
        end = len(self._data) - _TRAILER.size
        index, digest, magic = _TRAILER.unpack_from(self._data, max(end, 0))
        if magic != MAGIC or self._data[: len(MAGIC)] != MAGIC or not index < end:
            raise ValueError("it does not begin and end as a difference does")
        if hashlib.sha256(self._data[: end + _OFFSET.size]).digest() != digest:
            raise ValueError("its checksum is wrong")
        return json.loads(bytes(self._data[index:end]))

    def sides(self, name: str, *, backwards: bool) -> tuple[str, str]:
        """The sha256 of a tensor's bytes before and after a step. Raises DifferenceError if it is not in the file."""
        if (entry := self.entries.get(name)) is None:
            raise DifferenceError(f"{self.path} has no {name!r}")
        return (entry.after, entry.before) if backwards else (entry.before, entry.after)

    def block(self, name: str, i: int) -> memoryview:
        start, end = self.entries[name].offsets[i : i + 2]
        return self._data[start:end]


def walk(name: str, tensor: Bits, steps: Sequence[tuple[DifferenceFile, bool]], pool: ThreadPoolExecutor) -> Bits:
    """The bits of a whole tensor after ``steps`` (file, backwards), of which there is at least one.

    Raises DifferenceError if ``tensor`` is not where they start, a step does not follow the one before it, or they do not end
    where the last one says.
    """
    at = _sha256(tensor)
    for file, backwards in steps:
        given, wanted = file.sides(name, backwards=backwards)
        if at != given:
            raise DifferenceError(f"{file.path}: {name!r} is not the tensor that this difference starts from")
        at = wanted
    dtype = DTYPES[steps[0][0].entries[name].dtype]

    def through(i: int) -> Bits:  # all steps of one block, which stays in a core's cache
        block = tensor[i * BLOCK : (i + 1) * BLOCK]
        for file, backwards in steps:
            block = apply(block, file.block(name, i), dtype, backwards=backwards)
        return block

    other: Bits = np.concatenate(list(pool.map(through, range(max(1, -(-tensor.size // BLOCK))))))
    if _sha256(other) != at:
        raise DifferenceError(f"{steps[-1][0].path}: {name!r} does not become what it should")
    return other


def _check(entry: Entry, size: int) -> None:
    """What only a file made by other hands can have wrong, as the checksum was right."""
    blocks = max(1, -(-math.prod(entry.shape) // BLOCK))
    places = [len(MAGIC), *entry.offsets, size]
    if entry.dtype not in DTYPES or len(entry.offsets) != blocks + 1 or places != sorted(places):
        raise ValueError(f"{entry.name!r} is not described as a tensor is")
