"""The arena: all weights of a served model in one allocation that two processes share.

On CPU it is a memfd, sealed so that nobody can shrink or grow it under the other's feet. Page 0 is a header, then every
parameter on a page boundary of its own:

    | header | parameter 0 | pad | parameter 1 | pad | ...

The server makes it, the learner maps the same pages. Torch sees ordinary tensors; neither process ever holds a second copy.
On a GPU the weights are one allocation there (:mod:`insitu.live.weights.cuda`), and the memfd is page 0 alone.
"""

import copy
import fcntl
import hashlib
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from insitu.live.weights import cuda
from insitu.live.weights.header import HeaderPage

PAGE = 4096
NAME = "insitu-weights"
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEALS = 0x1 | 0x2 | 0x4  # SEAL, SHRINK, GROW
_CHUNK = 64 << 20  # bytes brought to the host at a time

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


class Arena(HeaderPage):
    """A mapping of the shared allocation. ``fd`` is owned by this object until :meth:`close`.

    ``slots`` may leave bytes out (rows that an engine pads), so the size is said apart: ``num_bytes``. ``on_device`` is the
    memory of the weights, uint8 [num_bytes], where it is not the memfd's own.
    """

    def __init__(self, fd: int, slots: list[Slot], num_bytes: int, on_device: torch.Tensor | None = None) -> None:
        self.fd = fd
        self.slots = slots
        self.num_bytes = num_bytes
        if (end := max(slot.offset + slot.num_bytes for slot in slots)) > num_bytes:
            raise ValueError(f"the layout ends at byte {end} of an arena of {num_bytes}: not the same model")
        mapped = num_bytes if on_device is None else PAGE
        if (size := os.fstat(fd).st_size) != mapped:
            raise ValueError(f"the arena has {size} bytes, its layout needs {mapped}: not the same model")
        if on_device is not None and on_device.numel() != num_bytes:
            raise ValueError(f"the device memory has {on_device.numel()} bytes, the layout needs {num_bytes}")
        if _seals(fd) & _SEALS != _SEALS:
            raise ValueError("the arena is not sealed against resizing; refusing to map memory that can vanish")
        super().__init__(mmap.mmap(fd, mapped))
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8) if on_device is None else on_device

    @classmethod
    def create(cls, slots: list[Slot], device: torch.device | str = "cpu") -> "Arena":
        """Allocate zeroed, sealed memory for ``slots`` and stamp a new epoch."""
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        num_bytes = end_of(slots[-1])
        on_device = None
        if torch.device(device).type != "cpu":
            on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        os.ftruncate(fd, num_bytes if on_device is None else PAGE)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        arena = cls(fd, slots, num_bytes, on_device)
        arena.found()
        return arena

    def renamed(self, slots: list[Slot]) -> "Arena":
        """The same mapping under other names and borders. The descriptor is shared: close one of the two."""
        other = copy.copy(self)
        other.slots = slots
        return other

    def close(self) -> None:
        """Give the descriptor back. The mapping itself ends with the last tensor that looks into it."""
        os.close(self.fd)

    def stamp(self, version: int, step: int = 0) -> None:
        if self._bytes.is_cuda:  # what was written is still on its way
            torch.cuda.synchronize(self._bytes.device)
        super().stamp(version, step)

    def manifest(self) -> dict[str, Any]:
        """What another process must know to map the weights; goes with the descriptor, to one process each time it is made."""
        slots = [{"name": s.name, "offset": s.offset, "dtype": s.dtype, "shape": list(s.shape)} for s in self.slots]
        where = {"device": "cuda", "cuda": cuda.export(self._bytes)} if self._bytes.is_cuda else {"device": "cpu"}
        return {"format": 1, **where, "num_bytes": self.num_bytes, "slots": slots}

    # -- weights -------------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return self._bytes.device

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
        for slot in sorted(self.slots, key=lambda slot: slot.name):
            for part in self._bytes[slot.offset : slot.offset + slot.num_bytes].split(_CHUNK):  # type: ignore[no-untyped-call]
                digest.update(part.cpu().numpy())
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
