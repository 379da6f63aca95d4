"""Versions of the weights on disk, and the only way to read one back.

Version 0 is the checkpoint that was served first. A lesson's version is the exact difference to the version it started from
(:mod:`insitu.live.difference_file`), a rollback is a new version that repeats an older one's bytes and needs no file.
Whoever wants weights, at start-up, for undo or for export, goes through :meth:`Versions.iter_version`, so a restarted
server never serves the base by accident.

A version is rebuilt from the nearest one that is there in full: the base, a checkpoint that compaction wrote, or the *undo
image*, a copy of the last committed version. Differences can be applied in both directions, so the way may lead back as
well as forward.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from insitu.live import difference_file
from insitu.live.checkpoint import VersionError, checkpoint_files, read, save_tensors, sync
from insitu.live.difference import DTYPES, DifferenceError, bits
from insitu.live.difference_file import DifferenceFile
from insitu.live.keeper import held
from insitu.live.records import Version, VersionFile
from insitu.live.store import Store
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena

log = logging.getLogger("insitu.versions")

_IMAGE = "undo-v{}.safetensors"
_CHECKPOINT = "checkpoint-v{}"


@dataclass(frozen=True, slots=True)
class Route:
    """How to come by a version: start from one that is there in full, apply differences (version, backwards) to it."""

    start: int
    steps: tuple[tuple[int, bool], ...] = ()


class Versions:
    """The versions of one state directory over one base checkpoint."""

    def __init__(self, state_dir: Path, base: Path, store: Store) -> None:
        self.directory = state_dir / "versions"
        self.base = base
        self.store = store
        self.directory.mkdir(mode=0o700, exist_ok=True)

    # -- which there are -----------------------------------------------------------------------------------------------
    def content(self, version: int) -> int:
        """The version whose file holds the bytes of ``version``: itself, or what a rollback repeats."""
        known = {v.id: v for v in self.store.versions() if v.status == "committed"}
        return _content(version, known)

    def path(self, version: int) -> Path:
        """The file of a version's difference."""
        return self.directory / f"v{version}.difference"

    def checkpoint(self, version: int) -> Path:
        """The directory of a version that compaction wrote in full."""
        return self.directory / _CHECKPOINT.format(version)

    def full(self) -> dict[int, list[Path]]:
        """The files of every version that is there in full, the undo image last."""
        found = {0: checkpoint_files(self.base)}
        for directory in self.directory.glob(_CHECKPOINT.format("*")):
            found[int(directory.name.rpartition("v")[2])] = checkpoint_files(directory)
        for image in self.directory.glob(_IMAGE.format("*")):
            found.setdefault(int(image.stem.rpartition("v")[2]), [image])
        return found

    def route(self, version: int, full: Mapping[int, object]) -> Route:
        """The shortest way to a version from one of ``full``. Raises VersionError when there is none, saying why."""
        known = {v.id: v for v in self.store.versions() if v.status == "committed"}
        content = _content(version, known)
        neighbours: dict[int, list[tuple[int, int, bool]]] = {}
        for v in known.values():
            if v.kind == "teach" and not v.pruned and v.parent is not None:
                parent = _content(v.parent, known, pruned=True)
                # Found from the end: on the way to the parent this difference is undone, on the way to the child done.
                neighbours.setdefault(v.id, []).append((parent, v.id, False))
                neighbours.setdefault(parent, []).append((v.id, v.id, True))
        came: dict[int, tuple[tuple[int, bool], ...]] = {content: ()}
        queue = deque([content])
        while queue:
            at = queue.popleft()
            if at in full:
                return Route(at, came[at])
            for other, file, backwards in neighbours.get(at, []):
                if other not in came:
                    came[other] = ((file, backwards), *came[at])
                    queue.append(other)
        raise VersionError(f"nothing is left from which version {version} could be rebuilt")

    # -- reading -------------------------------------------------------------------------------------------------------
    def iter_version(self, version: int, *, replay: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a committed version, by its name in the model; with ``replay`` from the base checkpoint alone.

        Raises VersionError naming what is missing, or is not what was written.
        """
        full = self.full()
        route = self.route(version, {0: full[0]} if replay else full)
        tensors = read(full[route.start])
        if not route.steps:
            yield from tensors
            return
        try:
            files = [(DifferenceFile(self.path(v)), backwards) for v, backwards in route.steps]
            entries = files[0][0].entries
            with ThreadPoolExecutor(_cores()) as pool:
                for name, tensor in tensors:
                    if name not in entries:  # a tied tensor's other name
                        continue
                    dtype = DTYPES[entries[name].dtype]
                    block = bits(tensor.to(dtype))
                    for file, backwards in files:
                        block = file.applied(name, block, pool, backwards=backwards)
                    yield name, torch.from_numpy(block.view(f"i{block.itemsize}")).view(dtype).view(tensor.shape)
        except DifferenceError as error:
            raise VersionError(
                f"version {version} cannot be rebuilt: {error}; put the right file back, or roll back to another version"
            ) from error

    # -- the arena -----------------------------------------------------------------------------------------------------
    def bring_up(self, arena: Arena, aliases: Mapping[str, str], source: str = "") -> None:
        """An engine has loaded the base checkpoint into a new arena: make it the last committed version.

        In a new state directory that is version 0, which is recorded as coming from ``source``. Raises VersionError when the
        directory belongs to another checkpoint, or the version's file is not what was committed.
        """
        # A learner that outlived the last server may be about to commit the file it has just written.
        if not held(self.directory.parent / "learner.lock"):
            self.discard_uncommitted()
        loaded = arena.sha256()
        head, first = self.store.head(), self.store.version(0)
        if head is None or first is None:
            self.store.commit(self.store.reserve("base", None), loaded, {"source": source})
            head = 0
        elif first.sha256 != loaded:
            raise VersionError(
                f"{self.directory.parent} belongs to another model ({self.store.get_meta('base')}); choose another "
                f"--state-dir for {self.base}"
            )
        self.store.set_meta("base", str(self.base))
        if self.content(head) == 0:
            arena.stamp(head)
        else:
            self.restore(head, arena, aliases)

    def restore(self, version: int, arena: Arena, aliases: Mapping[str, str]) -> None:
        """The arena becomes this version, bit for bit, and says so. Nobody may read the weights meanwhile.

        Raises VersionError or AttachError; the header then still says that a write is going on.
        """
        recorded = self.store.version(version)
        self.content(version)  # refuses one that does not exist before anything is touched
        assert recorded is not None
        arena.mark_writing()
        try:
            self._fill(recorded, arena, aliases)
        except VersionError as error:
            if not (images := list(self.directory.glob(_IMAGE.format("*")))):
                raise
            # It is only a copy, and a power cut may have torn it: the durable files may know better.
            log.warning("%s; trying again without the undo image", error)
            for image in images:
                image.unlink()
            self._fill(recorded, arena, aliases)
        arena.stamp(version)

    def _fill(self, version: Version, arena: Arena, aliases: Mapping[str, str]) -> None:
        with torch.no_grad():
            attach.fill(arena.views(), self.iter_version(version.id), aliases)
        if arena.sha256() != version.sha256:
            raise VersionError(
                f"the files of version {version.id} do not hold the bytes that were committed; put the right files back, or "
                "start with an empty --state-dir"
            )

    # -- writing -------------------------------------------------------------------------------------------------------
    def write(self, version: int, views: Mapping[str, torch.Tensor]) -> VersionFile:
        """Make the bytes of ``views`` durable as ``version``, which is reserved. It exists once the store has committed it.

        On any failure (a full disk: OSError) no file is left behind under the version's name.
        """
        reserved = self.store.version(version)
        assert reserved is not None
        assert reserved.parent is not None
        target = self.path(version)
        partial = target.with_suffix(".partial")
        before = ((name, tensor.to(views[name].dtype)) for name, tensor in self._names(reserved.parent, views))
        try:
            with partial.open("wb") as file:
                written = difference_file.write(file, before, views, _cores())
            sync(partial)
            partial.replace(target)
            sync(self.directory)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                error.errno, f"version {version} could not be written to {self.directory}: {error}"
            ) from error
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return VersionFile(target.name, written.bytes, written.sha256, written.norm_ratio)

    def _names(self, parent: int, views: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """The parent without the other names of tied tensors, which a checkpoint may repeat."""
        return ((name, tensor) for name, tensor in self.iter_version(parent) if name in views)

    def keep_image(self, version: int, views: Mapping[str, torch.Tensor]) -> None:
        """Let the undo image be this version, whose bytes ``views`` are. The base is its own image.

        It is a cache: not synced, and checked whenever it is used. Raises OSError when there is no room; an older image then
        still serves.
        """
        content = self.content(version)
        image = self.directory / _IMAGE.format(content)
        if content != 0 and not image.exists() and not self.checkpoint(content).exists():
            partial = image.with_suffix(".partial")
            try:
                save_tensors(dict(views), partial, durable=False)
                partial.replace(image)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        for other in self.directory.glob(_IMAGE.format("*")):
            if other != image:
                other.unlink()

    def discard_uncommitted(self) -> list[Path]:
        """Delete files of versions that were never committed: left-overs of a process that was killed while writing."""
        committed = {v.id for v in self.store.versions() if v.status == "committed" and not v.pruned}
        kept = {self.path(v) for v in committed} | {self.checkpoint(v) for v in committed}
        kept |= {self.directory / _IMAGE.format(v) for v in committed}
        stray = [file for file in self.directory.iterdir() if file not in kept]
        for file in stray:
            remove(file)
        return stray


def _content(version: int, known: Mapping[int, Version], *, pruned: bool = False) -> int:
    """The version whose bytes these are; one that was pruned only if that is asked for."""
    at = version
    while True:
        found = known.get(at)
        if found is None:
            raise VersionError(f"version {version} does not exist; committed versions: {_listed(known)}")
        if found.pruned and not pruned:
            raise VersionError(
                f"version {version} was pruned to save room, its bytes are gone; versions that are left: {_listed(known)}"
            )
        if found.target is None:
            return at
        at = found.target


def _listed(known: Mapping[int, Version]) -> list[int]:
    return [v.id for v in known.values() if not v.pruned]


def remove(path: Path) -> None:
    """A file, or a directory of files."""
    if path.is_dir() and not path.is_symlink():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    else:
        path.unlink()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
