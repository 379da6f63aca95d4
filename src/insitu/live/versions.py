"""Versions of the weights on disk, and the only way to read one back.

Version 0 is the checkpoint that was served first. A lesson's version is the exact difference to the version it started from
(:mod:`insitu.live.difference_file`), a rollback is a new version that repeats an older one's bytes and needs no file.
Whoever wants weights, at start-up, for undo or for export, goes through :meth:`Versions.iter_version`, so a restarted
server never serves the base by accident.

A version is rebuilt from the nearest one that is there in full: the base, a checkpoint that compaction wrote, or an *undo
image*, a copy of the last committed version or of the one before. Differences can be applied in both directions, so the way
may lead back as well as forward (:mod:`insitu.live.routes`).
"""

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from insitu.data.durable import fsync
from insitu.live import difference_file
from insitu.live.checkpoint import VersionError, checkpoint_files, read, remove
from insitu.live.difference import DTYPES, DifferenceError, bits
from insitu.live.difference_file import DifferenceFile, walk
from insitu.live.images import Images
from insitu.live.keeper import held
from insitu.live.records import Version, VersionFile
from insitu.live.routes import History
from insitu.live.store import Store
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena

log = logging.getLogger("insitu.versions")

_CHECKPOINT = "checkpoint-v{}"


class Versions:
    """The versions of one state directory over one base checkpoint."""

    def __init__(self, state_dir: Path, base: Path, store: Store) -> None:
        self.directory = state_dir / "versions"
        self.base = base
        self.store = store
        self.images = Images(self.directory)
        if not self.directory.exists():
            self.directory.mkdir(mode=0o700, exist_ok=True)
            fsync(state_dir)  # its name must be as durable as what will be in it

    # -- which there are -----------------------------------------------------------------------------------------------
    def history(self) -> History:
        return History(self.store.versions())

    def content(self, version: int) -> int:
        """The version whose bytes these are: itself, or what a rollback repeats. Raises VersionError when they are gone."""
        return self.history().content(version)

    def path(self, version: int) -> Path:
        """The file of a version's difference."""
        return self.directory / f"v{version}.difference"

    def checkpoint(self, version: int) -> Path:
        """The directory of a version that compaction wrote in full."""
        return self.directory / _CHECKPOINT.format(version)

    def full(self, *, images: bool = True) -> dict[int, list[Path]]:
        """The files of every version that is there in full, undo images last; ``images=False`` leaves those out.

        What was pruned does not count, though a process that was killed may have left files of it.
        """
        left = self.history().left()
        there = {path.name for path in self.directory.iterdir()}
        found = {0: checkpoint_files(self.base)}
        found |= {v: checkpoint_files(self.checkpoint(v)) for v in left if self.checkpoint(v).name in there}
        if images:
            kept = {v: [self.images.path(v)] for v in left if self.images.path(v).name in there}
            found = {**found, **{v: files for v, files in kept.items() if v not in found}}
        return found

    # -- reading -------------------------------------------------------------------------------------------------------
    def iter_version(self, version: int, *, replay: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a committed version, by its name in the model and in the order of names; with ``replay`` from the
        base checkpoint and differences alone.

        Raises VersionError naming what is missing, or is not what was written.
        """
        yield from self.rebuild(version, {0: checkpoint_files(self.base)} if replay else self.full())

    def rebuild(self, version: int, full: Mapping[int, list[Path]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, from one of ``full``. Every difference is checked on both sides; what needs none is as it lies there."""
        history = self.history()
        route = history.route(version, history.ways(full))
        tensors = read(full[route.start])
        if not route.steps:
            yield from tensors
            return
        try:
            files = [(DifferenceFile(self.path(v)), backwards) for v, backwards in route.steps]
            missing = dict(files[-1][0].entries)
            with ThreadPoolExecutor(_cores()) as pool:
                for name, tensor in tensors:
                    if (entry := missing.pop(name, None)) is None:  # a tied tensor's other name
                        continue
                    dtype = DTYPES[entry.dtype]
                    block = walk(name, bits(tensor.to(dtype)), files, pool)
                    yield name, torch.from_numpy(block.view(f"i{block.itemsize}")).view(dtype).view(entry.shape)
            if missing:
                raise DifferenceError(f"version {route.start}, from which it is rebuilt, lacks {min(missing)!r}")
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
                f"{self.directory.parent} belongs to another model ({self.store.get_meta('base')}), or to this one in another "
                f"--dtype; choose another --state-dir for {self.base}"
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
        except (VersionError, attach.AttachError) as error:
            self._distrust_images(error)
            self._fill(recorded, arena, aliases)
        arena.stamp(version)

    def _distrust_images(self, error: Exception) -> None:
        """Whatever was read wrong shall be read again, from durable files: the image is only a copy, and a power cut may have
        torn it. Also, a learner that outlived its server may just have pruned what the way led over."""
        log.warning("%s; trying again without the undo image", error)
        self.images.keep_only([])

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
        assert reserved.status == "reserved", f"version {version} is {reserved.status}"
        assert reserved.parent is not None
        target = self.path(version)
        partial = target.with_suffix(".partial")
        try:
            try:
                written = self._write(partial, reserved.parent, views)
            except VersionError as error:
                self._distrust_images(error)
                written = self._write(partial, reserved.parent, views)
            fsync(partial)
            partial.replace(target)
            fsync(self.directory)
        except BaseException as error:
            for file in (partial, target):  # also when only its name could not be made durable
                file.unlink(missing_ok=True)
            if isinstance(error, OSError):
                said = f"version {version} could not be written to {self.directory}: {error}"
                raise OSError(error.errno, said) from error
            raise
        return VersionFile(target.name, written.bytes, written.sha256, written.norm_ratio)

    def _write(self, file: Path, parent: int, views: Mapping[str, torch.Tensor]) -> difference_file.Written:
        """The difference to ``parent``. Raises VersionError when that was read as other bytes than were committed: no chain
        would ever lead over a difference to those."""
        # A checkpoint may repeat a tied tensor under its other name.
        tensors = ((name, tensor) for name, tensor in self.iter_version(parent) if name in views)
        before = ((name, tensor.to(views[name].dtype)) for name, tensor in tensors)
        with file.open("wb") as opened:
            written = difference_file.write(opened, before, views, _cores())
        recorded = self.store.version(parent)
        if recorded is None or recorded.sha256 != written.before:
            raise VersionError(
                f"the files of version {parent} do not hold the bytes that were committed; put the right files back, or roll "
                "back to another version"
            )
        return written

    def keep_image(self, version: int, views: Mapping[str, torch.Tensor]) -> None:
        """Let there be an undo image of this version, whose bytes ``views`` are, and keep that of the version before, so that
        one step back is a copy. A version that is there in full is its own image.

        Raises OSError when there is no room; an older image then still serves.
        """
        history = self.history()
        content = history.content(version)
        if content not in self.full():
            self.images.save(content, views)
        parent = history.known[version].parent
        self.images.keep_only({content, history.content(parent) if parent in history.left() else None})

    def bring_near(self, version: int) -> None:
        """Let there be an image of this version, unless it is there in full: restoring it then takes no longer than any undo,
        however far it is. For whoever will have readers wait for :meth:`restore`; they go on reading meanwhile.

        Takes the weights' bytes in host memory once more while it lasts. Raises OSError when there is no room, and VersionError
        as :meth:`iter_version`.
        """
        content = self.content(version)
        if content in self.full():
            return
        try:
            tensors = dict(self.iter_version(content))
        except VersionError as error:
            self._distrust_images(error)
            tensors = dict(self.iter_version(content))
        self.images.save(content, tensors)

    def strays(self) -> list[Path]:
        """Files that are of no version which can be asked for."""
        committed = {v.id for v in self.store.versions() if v.status == "committed" and not v.pruned}
        kept = {self.path(v) for v in committed} | {self.checkpoint(v) for v in committed}
        kept |= {self.images.path(v) for v in committed}
        return [file for file in self.directory.iterdir() if file not in kept]

    def discard_uncommitted(self) -> list[Path]:
        """Delete files of versions that were never committed, or were pruned: left-overs of a process that was killed.

        Nobody may be writing a version: either the learner calls this, or there is none.
        """
        stray = self.strays()
        for file in stray:
            remove(file)
        return stray


def _cores() -> int:
    return len(os.sched_getaffinity(0))
