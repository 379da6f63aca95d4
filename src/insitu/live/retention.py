"""How much room versions may take: a refusal before the disk is full, and the end of versions that nobody can want back.

The rule: the last ``keep`` versions, every pinned one, the base and the served one stay; what no way to one of them leads over
is pruned. When the files that a complete checkpoint of the oldest kept version would make superfluous are larger than that
checkpoint, it is written, and they go.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from insitu.live.checkpoint import write_checkpoint
from insitu.live.versions import Versions, remove

log = logging.getLogger("insitu.versions")

# Of the weights' bytes: what a version takes at most in all that was measured (bf16 0.12, fp32 more), and an undo image.
_LARGEST_DIFFERENCE = 1.0
_IMAGE = 1.0
_RESERVE = 64 << 20  # bytes left to the store and to logs


class NoRoomError(OSError):
    """There is no room for another version; nothing was changed."""


def usage(directory: Path) -> int:
    """Bytes of all files under ``directory``."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def require_room(versions: Versions, weight_bytes: int, limit_gb: float | None) -> None:
    """Raises NoRoomError unless a version of the largest size fits, with a new undo image beside the old one."""
    needed = int((_LARGEST_DIFFERENCE + _IMAGE) * weight_bytes) + _RESERVE
    free = shutil.disk_usage(versions.directory).free
    if free < needed:
        raise NoRoomError(
            f"the disk of {versions.directory} has {free / 1e9:.2f} GB free, a lesson may need {needed / 1e9:.2f} GB; make "
            "room there, or keep fewer versions (--teach.keep-versions), and post again"
        )
    if limit_gb is not None and (used := usage(versions.directory)) + needed - _RESERVE > limit_gb * 1e9:
        raise NoRoomError(
            f"{versions.directory} takes {used / 1e9:.2f} GB, a lesson may need {(needed - _RESERVE) / 1e9:.2f} GB more, the "
            f"limit is {limit_gb:g} GB; raise --teach.disk-limit-gb, or keep fewer versions, and post again"
        )


def tidy(versions: Versions, keep: int) -> list[int]:
    """Prune what the rule lets go; returns the pruned versions. Raises OSError when a checkpoint cannot be written."""
    store = versions.store
    committed = {v.id: v for v in store.versions() if v.status == "committed" and not v.pruned}
    if not committed:
        return []
    contents = {id: versions.content(id) for id in committed}
    last = sorted(committed)[-keep:]
    pinned = [id for id, v in committed.items() if v.pinned]
    kept = {contents[id] for id in [*last, *pinned]} | {0}
    full = {id: files for id, files in versions.full().items() if id == 0 or versions.checkpoint(id).exists()}

    oldest = min(contents[id] for id in last)
    if oldest not in full:
        without = _superfluous(versions, kept, full, committed)
        beyond = _superfluous(versions, kept, {**full, oldest: []}, committed)
        weights = sum(file.stat().st_size for file in full[0])
        saved = sum(_size(versions, id) for id in beyond - without)
        saved += sum(usage(versions.checkpoint(id)) for id in beyond & full.keys())
        if saved > weights:
            origin = {"version": oldest, "sha256": committed[oldest].sha256, "base": str(versions.base)}
            write_checkpoint(versions.checkpoint(oldest), versions.base, versions.iter_version(oldest), origin)
            log.info("version %d was written in full", oldest)
            full[oldest] = []
    gone = _superfluous(versions, kept, full, committed)
    _prune(versions, gone)
    return sorted(gone)


def _superfluous(
    versions: Versions, kept: set[int], full: Mapping[int, object], committed: Mapping[int, object]
) -> set[int]:
    """Versions over whose files no way from one of ``full`` to one of ``kept`` leads. Rollbacks have no files."""
    used: set[int] = set()
    for id in kept:
        route = versions.route(id, full)
        used |= {route.start, *(file for file, _ in route.steps)}
    with_files = {id for id in committed if versions.path(id).exists() or versions.checkpoint(id).exists()}
    return with_files - used - kept


def _size(versions: Versions, id: int) -> int:
    file = versions.path(id)
    return file.stat().st_size if file.exists() else 0


def _prune(versions: Versions, gone: set[int]) -> None:
    """First the store says that they are gone, then they go: nobody may find half of one."""
    if not gone:
        return
    versions.store.prune(sorted(gone))
    log.info("pruned versions %s", sorted(gone))
    for id in gone:
        for path in (versions.path(id), versions.checkpoint(id)):
            if path.exists():
                remove(path)
