"""Directories that are made once, whole or not at all: by one process while the others wait, and safe from being killed."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from insitu.data.messages import DataError


def directory_made(prefix: Path, key: str, make: Callable[[Path], object]) -> Path:
    """The directory ``prefix-HASH``, hash of everything that its content depends on (``key``); ``make(directory)`` fills it if
    it is not there. It is filled under another name, forced to disk and renamed, so what has the final name is complete.

    Raises:
        DataError: it cannot be made.
    """
    directory = prefix.with_name(f"{prefix.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
    if directory.is_dir():
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(directory.name + ".lock")):
            if not directory.is_dir():  # else another process made it while this one waited
                partial = directory.with_name(directory.name + ".partial")
                if partial.exists():  # of a process that was killed: under the lock nobody else writes it
                    shutil.rmtree(partial)
                partial.mkdir()
                make(partial)
                sync(partial)
                partial.rename(directory)
                fsync(directory.parent)
    except OSError as error:
        full = "; make room or choose another directory" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(f"{directory} could not be made: {error}{full}") from error
    return directory


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel gives it back when that process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync(directory: Path) -> None:
    """Force every file of a directory to disk, and the directories."""
    for path in directory.rglob("*"):
        fsync(path)
    fsync(directory)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by one rename: its old content or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    fsync(path.parent)
