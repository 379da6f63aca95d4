"""Page 0 of the arena: which version the weights are, and whether somebody is writing them."""

import os
import struct
from dataclasses import dataclass
from mmap import mmap

MAGIC = b"INSITU\x00\x01"
# magic, epoch (one for each life of a server), committed version, step of the trial (0: none), writer's pid (0: no write)
_LAYOUT = struct.Struct("<8s16sQQQ")


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


class HeaderPage:
    """A mapping that begins with page 0."""

    def __init__(self, mapping: mmap) -> None:
        self._map = mapping

    def found(self) -> None:
        """Begin a new arena: a new epoch, nothing written."""
        _LAYOUT.pack_into(self._map, 0, MAGIC, os.urandom(16), 0, 0, 0)

    @property
    def header(self) -> Header:
        magic, epoch, version, step, writer = _LAYOUT.unpack_from(self._map, 0)
        if magic != MAGIC:
            raise ValueError("this memory is not an insitu arena (wrong magic in its header)")
        return Header(epoch.hex(), version, step, writer)

    def stamp(self, version: int, step: int = 0) -> None:
        """The weights now are this version, or this step of a trial that started from it; no write is going on."""
        struct.pack_into("<QQQ", self._map, 24, version, step, 0)

    def mark_writing(self) -> None:
        """From here until :meth:`stamp` the weights are torn: whoever finds the mark and the writer dead must restore."""
        struct.pack_into("<Q", self._map, 40, os.getpid())
