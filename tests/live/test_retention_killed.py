"""Tidying killed at every line that writes: what was not pruned is read back, and the next time finishes the work."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from versioned import Tensors, back, base_tensors, names, open_versions, random_bits, raw, roll_back, small_base, teach

from insitu.live import checkpoint
from insitu.live.checkpoint import VersionError
from insitu.live.retention import tidy
from insitu.live.store import Store

# Everything that changes a disk here. pathlib and shutil come down to os.
WRITES = [
    *((os, name) for name in ("unlink", "rename", "replace", "rmdir", "fsync")),
    (tempfile, "mkdtemp"), (shutil, "copyfile"), (checkpoint, "save_file"), (Path, "write_text"), (Store, "prune"),
]  # fmt: skip


class Killed(BaseException):
    """From here on nothing is written any more, not by any clean-up either."""


class Mortal:
    """Lets so many writes happen."""

    def __init__(self, lives: int) -> None:
        self.lives = lives

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def write(*args: Any, **kwargs: Any) -> Any:
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            return real(*args, **kwargs)

        return write


def prepare(state_dir: Path, base: Path) -> dict[int, Tensors]:
    """A state in which tidy() prunes at once, writes a checkpoint, prunes again, and removes an older checkpoint."""
    state_dir.mkdir()
    versions = open_versions(state_dir, base)
    made = {0: base_tensors(versions)}

    def lessons(count: int) -> None:
        for _ in range(count):
            tensors = random_bits(made[max(made)], len(made))
            made[teach(versions, tensors)] = tensors

    lessons(3)
    assert tidy(versions, keep=1) == [1, 2]
    lessons(3)
    made[roll_back(versions, 5)] = made[5]
    lessons(2)
    (versions.directory / "v99.partial").write_bytes(b"half")
    versions.keep_image(9, made[9])
    versions.store.close()
    return made


def survives(state_dir: Path, base: Path, made: dict[int, Tensors]) -> list[int]:
    """What was not pruned is read back, by whoever comes next; returns it."""
    versions = open_versions(state_dir, base)
    left = [v.id for v in versions.store.versions() if not v.pruned]
    assert {0, 8, 9} <= set(left)
    for version in made:
        if version in left:
            assert back(versions, version) == raw(made[version])
        elif version > 2:
            with pytest.raises(VersionError, match=f"version {version} was pruned"):
                next(versions.iter_version(version))
    versions.store.close()
    return left


def test_killed_before_any_write_every_version_that_is_left_is_read_back_and_the_next_one_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base(tmp_path / "base")
    made = prepare(tmp_path / "state", base)
    lives, finished = 0, False
    while not finished:
        state_dir = tmp_path / f"killed-{lives}"
        shutil.copytree(tmp_path / "state", state_dir)
        versions = open_versions(state_dir, base)
        mortal = Mortal(lives)
        with monkeypatch.context() as patch:
            for owner, name in WRITES:
                patch.setattr(owner, name, mortal.wrap(getattr(owner, name)))
            try:
                tidy(versions, keep=2)
                finished = True
            except Killed:
                pass
        versions.store.close()
        survives(state_dir, base, made)
        again = open_versions(state_dir, base)
        tidy(again, keep=2)
        assert [v.id for v in again.store.versions() if not v.pruned] == [0, 8, 9]
        assert names(again) == ["checkpoint-v8", "undo-v9.safetensors", "v8.difference", "v9.difference"]
        again.store.close()
        assert survives(state_dir, base, made) == [0, 8, 9]
        lives += 1
    assert lives > 15
