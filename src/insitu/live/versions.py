"""Versions of the weights on disk, and the only way to read one back.

A version is, for now, a complete safetensors file; version 0 is the checkpoint that was served first, and a rollback is a
new version that repeats an older one's bytes and needs no file. Whoever wants weights, at start-up, for undo or for export,
goes through :meth:`Versions.iter_version`, so a restarted server never serves the base by accident.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from insitu.live.keeper import held
from insitu.live.store import Store
from insitu.live.weights import attach
from insitu.live.weights.arena import Arena


class VersionError(ValueError):
    """A version that does not exist, was never committed, or whose file is not what was written."""


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a Transformers checkpoint directory."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [model_dir / name for name in names]
    if (single := model_dir / "model.safetensors").exists():
        return [single]
    raise VersionError(f"{model_dir} holds no model.safetensors; convert the checkpoint with save_pretrained() first")


def read(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one at a time, from memory-mapped files. Raises VersionError naming a file that cannot be read."""
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)
        except Exception as error:  # safetensors raises its own type for a file that is cut short
            raise VersionError(f"{file} cannot be read: {error}") from error


class Versions:
    """The versions of one state directory over one base checkpoint."""

    def __init__(self, state_dir: Path, base: Path, store: Store) -> None:
        self.directory = state_dir / "versions"
        self.base = base
        self.store = store
        self.directory.mkdir(mode=0o700, exist_ok=True)

    def content(self, version: int) -> int:
        """The version whose file holds the bytes of ``version``: itself, or what a rollback repeats."""
        while True:
            found = self.store.version(version)
            if found is None or found.status != "committed":
                known = [v.id for v in self.store.versions() if v.status == "committed"]
                raise VersionError(f"version {version} does not exist; committed versions: {known}")
            if found.target is None:
                return version
            version = found.target

    def path(self, version: int) -> Path:
        return self.directory / f"v{version}.safetensors"

    def iter_version(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a committed version, by its name in the model. Raises VersionError naming what is missing."""
        content = self.content(version)
        if content == 0:
            yield from read(checkpoint_files(self.base))
            return
        if not (file := self.path(content)).exists():
            raise VersionError(f"the file of version {content} is missing: {file}")
        yield from read([file])

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
        arena.mark_writing()
        with torch.no_grad():
            attach.fill(arena.views(), self.iter_version(version), aliases)
        recorded = self.store.version(version)
        if recorded is None or arena.sha256() != recorded.sha256:
            raise VersionError(
                f"the file of version {version} does not hold the bytes that were committed; put the right file back, or "
                "start with an empty --state-dir"
            )
        arena.stamp(version)

    def write(self, version: int, views: Mapping[str, torch.Tensor]) -> None:
        """Make the bytes of ``views`` durable as ``version``. It exists only once the store has committed it.

        On any failure (a full disk: OSError) no file is left behind under the version's name.
        """
        target = self.path(version)
        partial = target.with_suffix(".partial")
        try:
            try:
                save_file(dict(views), partial, metadata={"format": "pt", "insitu_version": str(version)})
            except SafetensorError as error:  # what safetensors makes of the system's error
                raise OSError(f"version {version} could not be written to {self.directory}: {error}") from error
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(target)
            directory = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def discard_uncommitted(self) -> list[Path]:
        """Delete files of versions that were never committed: left-overs of a process that was killed while writing."""
        committed = {self.path(v.id) for v in self.store.versions() if v.status == "committed"}
        stray = [file for file in self.directory.iterdir() if file not in committed]
        for file in stray:
            file.unlink()
        return stray
