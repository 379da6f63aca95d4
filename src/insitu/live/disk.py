"""Is it the disk? A full one must cost nothing that was accepted or committed, and be told in words that say what to do."""

import errno
import os
import sqlite3
import tempfile
from contextlib import suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files (ulimit -f)
_SQLITE_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)
_STORE_BYTES = 1 << 16  # what a change in the store needs at most


def is_full(error: BaseException) -> bool:
    """Whether this error, or what it came from, is a disk that takes no more."""
    if isinstance(error, sqlite3.Error):
        # SQLite reports a limit on the size of files, and some quotas, as a failed write.
        return getattr(error, "sqlite_errorcode", None) in _SQLITE_FULL
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(f"os error {number}" in str(error) for number in _FULL):  # as safetensors words the system's error
        return True
    return error.__cause__ is not None and is_full(error.__cause__)


def shortage(directory: Path, num_bytes: int = _STORE_BYTES) -> str | None:
    """Why so many bytes cannot be written there, and the way out; None if they can. Room is taken and given back."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:  # it never has a name that could stay behind
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno in _FULL:
            return describe(directory, error.strerror)
        return f"{directory} cannot be written ({error.strerror}): mend that, and learning goes on by itself"
    return None


def describe(directory: Path, reason: object) -> str:
    return f"no room on the disk of {directory} ({reason}): free some, and learning goes on by itself"


def usage(path: Path) -> int:
    """Bytes of a file, or of all files under a directory; what is not there, or goes meanwhile, takes none."""
    total = 0
    # Unlike rglob, walk passes over a directory that vanishes under it.
    for file in [path, *(Path(directory) / name for directory, _, names in os.walk(path) for name in names)]:
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total
