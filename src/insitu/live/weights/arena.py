"""The arena: all weights of a served model in one allocation that two processes share.

On CPU it is a memfd, sealed so that nobody can shrink or grow it under the other's feet. Page 0 is a header, then every
parameter on a page boundary of its own:

    | header | parameter 0 | pad | parameter 1 | pad | ...

The server makes it, the learner maps the same pages. Torch sees ordinary tensors; neither process ever holds a second copy.
"""

import copy
import fcntl
import hashlib
import mmap
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

PAGE = 4096
NAME = "insitu-weights"
_MAGIC = b"INSITU\x00\x01"
# magic, epoch (one for each life of a server), committed version, step of the trial (0: none), writer's pid (0: no write)
_HEADER = struct.Struct("<8s16sQQQ")
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4  # SEAL, SHRINK, GROW

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter lies: byte offset in the arena, dtype and shape (always contiguous)."""

    name: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What page 0 says. ``writer`` is the pid of a process that has begun to change weights and has not said it is done."""

    epoch: str
    version: int
    step: int
    writer: int

    @property
    def label(self) -> str:
        """The version as it is stamped on answers: ``"12"``, or ``"12+3"`` in a trial."""
        return f"{self.version}+{self.step}" if self.step else str(self.version)


def end_of(slot: Slot) -> int:
    """The page boundary behind a slot."""
    return slot.offset + -(-slot.num_bytes // PAGE) * PAGE


def plan(tensors: Iterable[tuple[str, torch.dtype, Iterable[int]]]) -> list[Slot]:
    """Lay parameters out one after the other, each on a page boundary. Raises ValueError on a dtype the arena cannot hold."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    slots, offset = [], PAGE
    for name, dtype, shape in tensors:
        if dtype not in names:
            raise ValueError(f"{name} has dtype {dtype}; the arena holds {', '.join(DTYPES)}")
        slot = Slot(name, offset, names[dtype], tuple(shape))
        slots.append(slot)
        offset = end_of(slot)
    return slots


class Arena:
    """A mapping of the shared allocation. ``fd`` is owned by this object until :meth:`close`.

    ``slots`` may leave bytes out (rows that an engine pads), so the size is said apart: ``num_bytes``.
    """

    def __init__(self, fd: int, slots: list[Slot], num_bytes: int) -> None:
        self.fd = fd
        self.slots = slots
        self.num_bytes = num_bytes
        if (end := max(slot.offset + slot.num_bytes for slot in slots)) > num_bytes:
            raise ValueError(f"the layout ends at byte {end} of an arena of {num_bytes}: not the same model")
        if (size := os.fstat(fd).st_size) != self.num_bytes:
            raise ValueError(f"the arena has {size} bytes, its layout needs {self.num_bytes}: not the same model")
        if _seals(fd) & _SEALS != _SEALS:
            raise ValueError("the arena is not sealed against resizing; refusing to map memory that can vanish")
        self._map = mmap.mmap(fd, self.num_bytes)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, slots: list[Slot]) -> "Arena":
        """Allocate zeroed, sealed memory for ``slots`` and stamp a new epoch."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        num_bytes = end_of(slots[-1])
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        arena = cls(fd, slots, num_bytes)
        _HEADER.pack_into(arena._map, 0, _MAGIC, os.urandom(16), 0, 0, 0)
        return arena

    def renamed(self, slots: list[Slot]) -> "Arena":
        """The same mapping under other names and borders. The descriptor is shared: close one of the two."""
        other = copy.copy(self)
        other.slots = slots
        return other

    def close(self) -> None:
        """Give the descriptor back. The mapping itself ends with the last tensor that looks into it."""
        os.close(self.fd)

    # -- header --------------------------------------------------------------------------------------------------------
    @property
    def header(self) -> Header:
        magic, epoch, version, step, writer = _HEADER.unpack_from(self._map, 0)
        if magic != _MAGIC:
            raise ValueError("this memory is not an insitu arena (wrong magic in its header)")
        return Header(epoch.hex(), version, step, writer)

    def stamp(self, version: int, step: int = 0) -> None:
        """The weights now are this version, or this step of a trial that started from it; no write is going on."""
        struct.pack_into("<QQQ", self._map, 24, version, step, 0)

    def mark_writing(self) -> None:
        """From here until :meth:`stamp` the weights are torn: whoever finds the mark and the writer dead must restore."""
        struct.pack_into("<Q", self._map, 40, os.getpid())

    # -- weights -------------------------------------------------------------------------------------------------------
    def view(self, slot: Slot) -> torch.Tensor:
        data = self._bytes[slot.offset : slot.offset + slot.num_bytes]
        return data.view(DTYPES[slot.dtype]).view(slot.shape)

    def views(self) -> dict[str, torch.Tensor]:
        """Every parameter by name, zero-copy."""
        return {slot.name: self.view(slot) for slot in self.slots}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's first element lies in this mapping."""
        return 0 <= tensor.data_ptr() - self._bytes.data_ptr() < self.num_bytes

    def sha256(self) -> str:
        """Of all weights in the order of their names, whatever the layout, padding left out. 0.2 s for 270 MB."""
        digest = hashlib.sha256()
        with memoryview(self._map) as memory:
            for slot in sorted(self.slots, key=lambda slot: slot.name):
                with memory[slot.offset : slot.offset + slot.num_bytes] as part:
                    digest.update(part)
        return digest.hexdigest()


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:  # no memfd at all
        return 0


def resident(pid: int | str = "self") -> dict[str, int]:
    """Rss, Pss and Private_Dirty of the arena in one process, in bytes, from /proc/PID/smaps: with one copy in two processes
    Pss is half of Rss and Private_Dirty is 0."""
    found = {"rss": 0, "pss": 0, "private_dirty": 0}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = f"/memfd:{NAME}" in line
        elif inside and (match := re.match(r"(Rss|Pss|Private_Dirty):\s+(\d+) kB", line)):
            found[match[1].lower()] += int(match[2]) * 1024
    return found
